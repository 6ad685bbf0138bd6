"""Ternary weights (BitNet b1.58): their codes, the layer, and reading them from checkpoints."""
