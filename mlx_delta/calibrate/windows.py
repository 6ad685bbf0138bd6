"""Windows of a text to calibrate on, and the progress shown over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from mlx_delta.config import DeltaConfig
from mlx_delta.measure.text import encode_text, first_tokens

from .record import highest_sparsity

LENGTH = 2048


def check_length(length: int | None, context: int | None, config: DeltaConfig) -> int:
    """Tokens of a window.

    Raises:
        ValueError: Longer than the context, or so short that no query sees a held key.
    """
    if length is None:
        length = min(LENGTH, context or LENGTH)
    if context is not None and length > context:
        raise ValueError(
            f"[calibrate] a window of {length} tokens is longer than the model's context of "
            f"{context}; give a smaller --length."
        )
    if length < 2 or highest_sparsity(config, length) == 0:
        exact = config.window + config.resolve(max(1, length)).block_size
        raise ValueError(
            f"[calibrate] nothing can be skipped in {length} tokens: a query sees up to {exact} "
            "tokens exactly; give a larger --length."
        )
    return length


def cut_windows(
    tokenizer: TokenizerWrapper, text: str | Sequence[int], length: int, windows: int
) -> list[list[int]]:
    """Windows of a text, spread evenly over it; BOS comes first where texts begin with one.

    Raises:
        ValueError: The text is shorter than a window.
    """
    if windows < 1:
        raise ValueError(f"[calibrate] windows must be >= 1 but got {windows}.")
    ids = encode_text(tokenizer, text) if isinstance(text, str) else list(text)
    first = first_tokens(tokenizer)
    fresh = length - len(first)
    available = len(ids) // fresh
    if not available:
        raise ValueError(
            f"[calibrate] the text has {len(ids)} tokens but a window takes {fresh}; give a "
            "longer --text or a smaller --length."
        )
    count = min(windows, available)
    starts = [i * available // count * fresh for i in range(count)]
    return [first + ids[start : start + fresh] for start in starts]


class ProgressBar:
    """A progress bar to be called after each step."""

    def __init__(self, total: int, name: str, shown: bool, unit: str = "window"):
        self._bar = tqdm(total=total, desc=name, unit=unit, leave=False, disable=not shown)

    def __enter__(self) -> Callable[[], None]:
        return lambda: self._bar.update()

    def __exit__(self, *_: object) -> None:
        self._bar.close()
