"""Finding out what a source is, and reading it: a path or a name on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .errors import ConvertError
from .files import MAX_JSON_BYTES, read_bytes, read_json
from .gguf_files import split_advice
from .tokenizer_files import TOKENIZER_FILES, check_tokenizer, read_tokenizer
from .weights import Source

HUB_PATTERNS = [
    "*.json",
    "model*.safetensors",
    "tokenizer.model",
    "*.jinja",
    "delta_sensitivities*.safetensors",  # a catalogued model's have a hash in their name
]

MAX_SENSITIVITIES_BYTES = 2**26


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source.

    Attributes:
        tokenizer_from: Directory, tokenizer file or hub name to take the tokenizer from.
        gguf_file: The file's name where a directory or repository has several.
        revision: Of a repository on the hub.
        i2s_layout: ``x86`` or ``arm``: I2_S files do not say which they are.
    """

    tokenizer_from: str | None = None
    gguf_file: str | None = None
    revision: str | None = None
    i2s_layout: str = "x86"


def open_source(name: str, options: SourceOptions, tokenizer: bool = True) -> Source:
    """Read a source as far as its headers.

    Args:
        name: Path or hub name.
        options: How to read it.
        tokenizer: Whether the files that go along are wanted.

    Raises:
        ConvertError: It does not exist or can't be converted.
    """
    path = locate(name, options)
    try:
        if path.is_file() or path.suffix == ".gguf":
            if path.suffix != ".gguf":
                raise ConvertError(f"{path} is a file but not GGUF; give the model's directory.")
            from .from_gguf import read_gguf

            own = tokenizer and options.tokenizer_from is None
            source = read_gguf(path, options.i2s_layout, tokenizer=own)
        else:
            from .from_mlx import is_mlx, read_mlx
            from .from_safetensors import read_safetensors

            mlx = is_mlx(read_json(path / "config.json"))
            source = read_mlx(path) if mlx else read_safetensors(path)
        if tokenizer:
            _read_files(source, path, options)
    except OSError as error:
        raise ConvertError(f"{path} can't be read: {error}.") from None
    return source


def _read_files(source: Source, path: Path, options: SourceOptions) -> None:
    """Add the tokenizer, the generation settings and the delta's sensitivities."""
    delta = source.config.get("delta")
    name = delta.get("sensitivities") if isinstance(delta, dict) else None
    if isinstance(name, str) and Path(name).name == name and (path / name).is_file():
        source.files[name] = read_bytes(path / name, MAX_SENSITIVITIES_BYTES)
    if options.tokenizer_from is not None:
        folder = locate_tokenizer(options.tokenizer_from)
    elif source.format != "gguf":
        folder = path
    else:
        if "tokenizer.json" not in source.files:
            raise ConvertError(
                f"{path} has no tokenizer that can be rebuilt ({source.notes[-1]}); give the "
                "directory of the original model, or its tokenizer.json, with --tokenizer-from."
            )
        return
    source.files |= read_tokenizer(folder)
    check_tokenizer(source.files, source.arch.vocab, str(folder))
    file = (folder.parent if folder.is_file() else folder) / "generation_config.json"
    if file.exists() or file.is_symlink():
        read_json(file)
        source.files["generation_config.json"] = read_bytes(file, MAX_JSON_BYTES)


def locate_tokenizer(name: str) -> Path:
    """The directory or file that ``--tokenizer-from`` means; no weights are fetched for it.

    Raises:
        ConvertError: There is no such thing.
    """
    path = _existing(name)
    if path is None:
        path = _fetch(name, None, list(TOKENIZER_FILES))
    if path.is_file() and path.suffix not in (".json", ".model"):
        raise ConvertError(
            f"{path} is no tokenizer: --tokenizer-from takes a directory with tokenizer.json or "
            "tokenizer.model, one of these files, or a hub name."
        )
    return path


def _existing(name: str) -> Path | None:
    """The path that a name means, or ``None`` if it can only be a hub name.

    Raises:
        ConvertError: It is neither.
    """
    if not name.strip() or "\0" in name:
        raise ConvertError("the source's name is empty; give a path or a hub name.")
    path = Path(name).expanduser()
    try:
        exists = path.exists()
    except OSError as error:
        raise ConvertError(f"{name[:200]} can't be read: {error}.") from None
    if exists:
        return path
    if path.is_symlink():
        raise ConvertError(f"{path} is a link to nothing or to itself.")
    from mlx_delta.loading import BUNDLED

    if name == Path(name).name and (BUNDLED / name / "config.json").is_file():
        return BUNDLED / name
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConvertError(f"{name[:200]!r} does not exist, nor is it a hub name (owner/name).")
    return None


def locate(name: str, options: SourceOptions) -> Path:
    """The file or directory that a name means; repositories are fetched.

    Raises:
        ConvertError: There is no such thing.
    """
    path = _existing(name)
    if path is None:
        gguf = [options.gguf_file or "*.gguf"]
        wanted = options.gguf_file or name.lower().endswith("gguf")
        path = _fetch(name, options.revision, HUB_PATTERNS + gguf * bool(wanted))
    if path.is_dir() and (options.gguf_file or not (path / "config.json").is_file()):
        files = sorted(path.glob("*.gguf"))
        if options.gguf_file:
            files = [file for file in files if file.name == options.gguf_file]
        if len(files) == 1:
            return files[0]
        parts = split_advice(files) if files else None
        if parts:
            raise ConvertError(f"{path} holds {parts}.")
        if files or options.gguf_file:
            raise ConvertError(
                f"{path} has {len(files)} matching GGUF files; name one with --gguf-file."
            )
        raise ConvertError(f"{path} has no config.json and no .gguf file: not a model.")
    return path


def _fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
    """Fetch some of a repository's files from the hub."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds without a common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConvertError(
            f"{name!r} is not here and could not be fetched from the hub: {reason}"
        ) from None
