"""``python -m mlx_delta``: the commands, and a way to each of them."""

from __future__ import annotations

import importlib
import sys

from mlx_delta.wording import nearest

# In the order in which one meets them. A command's package has its main in one of two modules.
COMMANDS = {
    "generate": "Generate text; mlx_lm.generate's flags, and the delta's.",
    "chat": "Talk to a model; the conversation's caches are kept from turn to turn.",
    "cache_prompt": "Read a prompt once, and keep its caches for many questions.",
    "server": "Serve a model over HTTP, as OpenAI's clients expect it.",
    "convert": "Convert a checkpoint (safetensors, GGUF, mlx-lm) for Macs, iPads and iPhones.",
    "calibrate": "Choose thresholds for a wanted sparsity or loss, and write them into a model.",
    "evaluate": "Measure what ways to keep keys and values save and cost on a model.",
    "benchmark": "Time them side by side, or compute how fast chips could decode.",
    "pictures": "Draw what the delta keeps and costs.",
}
MAINS = {"convert": "mlx_delta.convert.__main__"}


def help_text() -> str:
    """The commands, one line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m mlx_delta COMMAND ...",
            "",
            "Hybrid delta attention for language models on MLX.",
            "",
            "commands:",
            *lines,
            "",
            "python -m mlx_delta COMMAND --help says what a command takes; "
            "python -m mlx_delta.COMMAND is the same.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command, or list them; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if argv[0] == "--version":
        print(importlib.import_module("mlx_delta.version").VERSION)
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        print(
            f"error: unknown command {name!r}{nearest(name, COMMANDS)}; known are "
            f"{', '.join(COMMANDS)}.",
            file=sys.stderr,
        )
        return 1
    module = importlib.import_module(MAINS.get(name, f"mlx_delta.{name}.command"))
    return int(module.main(rest))


if __name__ == "__main__":
    sys.exit(main())
