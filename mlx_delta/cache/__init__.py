"""Held keys and their values: stores, the caches that mlx-lm works with, and files of them."""
