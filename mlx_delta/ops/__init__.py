"""Each step on plain arrays: its MLX form and its kernel's launcher side by side.

| step                         | MLX form                 | launcher            |
|------------------------------|--------------------------|---------------------|
| hold keys of whole blocks    | ``hold``                 | ``pack_kernel``     |
| pack and unpack them         | ``pack``                 | ``pack_kernel``     |
| attend to packed blocks      | ``attention.operations`` | ``decode_kernel``   |
| multiply with ternary weights| ``ternary.linear``       | ``ternary_matvec``  |

Nothing here knows of caches. Which back-end there is, and so whether a kernel runs, is said in one
place, ``backend``; what launchers share (checked shapes, small inputs made once) in ``launching``.
"""
