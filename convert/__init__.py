"""Converters from other weight formats, installed as ``mlx_delta.convert``.

In the checkout this folder stands at the top. It imports the standard library only, so that
importing it costs nothing and works before MLX is there.
"""
