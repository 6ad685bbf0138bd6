"""Each step on plain arrays: its MLX form and its kernel's launcher side by side.

Nothing here knows of caches. Whether a kernel runs is said in one place, ``backend``.
"""
