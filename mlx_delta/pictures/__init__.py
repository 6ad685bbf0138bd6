"""Pictures of what the delta keeps and costs: ``python -m mlx_delta.pictures KIND ...``.

One module for each kind of picture, ``theme.py`` for colours and files. Needs matplotlib, the
extra ``pictures``; nothing is imported here, so that the command line can say so.
"""
