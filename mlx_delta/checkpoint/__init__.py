"""Reading what others made: configurations, weights, tokenizers and adapters, checked first.

A model directory comes from anywhere. Whatever is wrong with one is said in one line, as a
``ValueError``, ``FileNotFoundError`` or ``MemoryError``, before a weight is read.
"""
