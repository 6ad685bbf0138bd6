"""The Metal kernel sources, and the one function that reads them.

In the checkout this folder stands at the top; installed, it is ``mlx_delta.kernels``. It imports
the standard library only: with the checkout on ``sys.path`` it is also importable as ``kernels``,
a name that transformers imports when it finds it.
"""

from functools import cache
from pathlib import Path


@cache
def kernel_source(filename: str) -> str:
    """Return the text of a kernel source file of this folder.

    Args:
        filename: A file's name with its suffix, such as ``codes_decode.metal`` or a ``.h`` that
            several kernels share.

    Raises:
        ValueError: If the folder has no such source file.
    """
    folder = Path(__file__).parent
    known = sorted(path.name for path in folder.iterdir() if path.suffix in (".metal", ".h"))
    if filename not in known:
        raise ValueError(f"[kernel_source] filename must be one of {known} but got {filename!r}.")
    return (folder / filename).read_text(encoding="utf-8")
