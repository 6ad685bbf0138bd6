"""Each step on plain arrays: its MLX form and its kernel's launcher side by side.

| step                         | MLX form                 | launcher            |
|------------------------------|--------------------------|---------------------|
| hold keys of whole blocks    | ``hold``                 | ``hold_kernel``     |
| cut them into runs           | ``runs``                 | ``runs_kernel``     |
| code keys, and attend to them| ``codes``                | ``codes_kernel``    |
| store held keys, and attend  | ``deltas``               | ``deltas_kernel``   |
| choose tiles of a prompt     | ``tiles``                | ``tiles_kernel``    |
| multiply with ternary weights| ``ternary.linear``       | ``ternary_matvec``  |

Nothing here knows of caches. Which back-end there is, and so whether a kernel runs, is said in one
place, ``backend``; what launchers share (checked shapes, small inputs made once) in ``launching``.
A kernel is tried against its MLX form before it is used: ``proving``.
"""
