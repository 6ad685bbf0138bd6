"""Hybrid delta attention over a cache, and the choice between kernel and operations."""
