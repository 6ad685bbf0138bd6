"""Convert a checkpoint for Macs, iPads and iPhones: ``python -m mlx_delta.convert SOURCE -o DIR``.

``python -m mlx_delta.convert check DIR`` checks a directory against mlx-swift-lm's rules.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mlx_delta.system.cli import Parser, plain_output

from .errors import ConvertError
from .options import make_job, make_parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    plain_output()
    try:
        # A model directory may have one of these names.
        command = arguments[0] if arguments else ""
        if command == "check" and (len(arguments) > 1 or not Path("check").exists()):
            return _check(arguments[1:])
        if command == "verify" and len(arguments) > 1:
            from .verify import main as verify

            return verify(arguments[1:])
        return _convert(arguments)
    except ConvertError as error:
        print(f"error: {error}", file=sys.stderr)
    except (OSError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        print(
            f"error: {reason}; free some space or memory and run it again.",
            file=sys.stderr,
        )
    except KeyboardInterrupt:
        print(
            "\nInterrupted. What is done stays in the .partial directory; run "
            "the same command again to continue.",
            file=sys.stderr,
        )
        return 130
    return 1


def _convert(arguments: list[str]) -> int:
    """Convert, or print the plan."""
    args = make_parser().parse_args(arguments)
    job = make_job(args)
    from .converting import convert, describe, prepare

    if args.dry_run:
        print(describe(*prepare(job)))
        print("dry run: nothing was written")
        return 0
    convert(job)
    return 0


def _check(arguments: list[str]) -> int:
    """Check directories against the rules of mlx-swift-lm's loader."""
    parser = Parser(
        prog="python -m mlx_delta.convert check",
        description="Check whether mlx-swift-lm, on iPads and iPhones, can load a directory.",
    )
    parser.add_argument("directory", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true", help="print the problems as JSON")
    args = parser.parse_args(arguments)
    from .check import check_directory

    found = {str(folder): check_directory(folder) for folder in args.directory}
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for folder, problems in found.items():
            print(f"{folder}: {'ok' if not problems else f'{len(problems)} problem(s)'}")
            for problem in problems:
                print(f"  {problem}")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
