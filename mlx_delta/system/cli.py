"""What the command lines share: one line for an error, and the exit status."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable


def run_command(run: Callable[[], None], smaller: str, interrupted: str = "Interrupted.") -> int:
    """Run a command's work.

    Args:
        run: The work. What a user can do something about it raises as ValueError, OSError,
            MemoryError or NotImplementedError, whose message is all that is printed.
        smaller: What to ask less of when memory runs out.
        interrupted: What to say after Ctrl-C.

    Returns:
        The exit status: 0, 1 after an error, 130 after Ctrl-C.
    """
    # It warns of texts beyond the context, for which the commands have words of their own.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        run()
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1  # whoever read our output has gone: nobody to tell
    except (ValueError, OSError, MemoryError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "memory" not in str(error).lower():
            raise
        # What MLX raises when the GPU can't hold any more.
        print(f"error: out of memory ({error}); {smaller}.", file=sys.stderr)
        return 1
    return 0
