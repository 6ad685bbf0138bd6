"""The files that go along with the weights: tokenizer, chat template, generation settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import ConvertError
from .files import MAX_JSON_BYTES, dump_json, parse_json, read_bytes

# Copied as they are when they are there.
JSON_FILES = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json")
OTHER_FILES = ("tokenizer.model",)
# Names that swift-transformers and transformers 4 know, for those of transformers 5.
TOKENIZER_CLASSES = {
    "TokenizersBackend": "PreTrainedTokenizerFast",
    "PreTrainedTokenizer": "PreTrainedTokenizerFast",
    "SentencePieceBackend": "LlamaTokenizer",
}
# Tokens that end a turn in chat templates and that a model's eos_token_id often lacks.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>")


def read_tokenizer(folder: Path) -> dict[str, bytes]:
    """The tokenizer files of a directory, by name.

    Where there is only a sentencepiece ``tokenizer.model``, a ``tokenizer.json`` is built.

    Raises:
        ConvertError: There is no tokenizer, or a file of it is broken.
    """
    files: dict[str, bytes] = {}
    for name in (*JSON_FILES, "tokenizer_config.json", "chat_template.json"):
        path = folder / name
        if path.exists() or path.is_symlink():
            files[name] = read_bytes(path, MAX_JSON_BYTES)
            if not isinstance(parse_json(files[name], str(path)), dict):
                raise ConvertError(f"{path} must hold a JSON object.")
    for name in (*OTHER_FILES, "chat_template.jinja"):
        path = folder / name
        if path.exists() or path.is_symlink():
            files[name] = read_bytes(path, MAX_JSON_BYTES)
    if "tokenizer.json" not in files:
        if "tokenizer.model" not in files:
            raise ConvertError(
                f"{folder} has no tokenizer.json and no tokenizer.model; give the directory of "
                "the original model with --tokenizer-from."
            )
        from .sentencepiece_model import build_tokenizer

        built = build_tokenizer(files["tokenizer.model"], str(folder / "tokenizer.model"))
        old = _object(files, "tokenizer_config.json")
        files["tokenizer.json"] = built["tokenizer.json"]
        new = parse_json(built["tokenizer_config.json"], "tokenizer_config.json")
        # What the model's own file says stays, but for the class: it may name a slow one.
        new = {**new, **old, "tokenizer_class": new["tokenizer_class"]}
        files["tokenizer_config.json"] = dump_json(new)
    return files


def finish_tokenizer(files: dict[str, bytes], notes: list[str]) -> dict[str, bytes]:
    """Make the files ones that mlx-lm and mlx-swift-lm both read.

    The chat template goes both into tokenizer_config.json and into chat_template.jinja: older
    readers know the first place only, transformers 5 writes the second only.
    """
    files = dict(files)
    config = _object(files, "tokenizer_config.json")
    name = str(config.get("tokenizer_class", "PreTrainedTokenizerFast"))
    config["tokenizer_class"] = TOKENIZER_CLASSES.get(name, name)
    if config.pop("auto_map", None) is not None:
        notes.append("tokenizer_config.json: auto_map left out, it names code that is not here")
    template = chat_template(files)
    if template is not None:
        config["chat_template"] = template
        files["chat_template.jinja"] = template.encode()
    files["tokenizer_config.json"] = dump_json(config)
    return files


def chat_template(files: dict[str, bytes]) -> str | None:
    """The chat template, from whichever file has it."""
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode("utf-8")
        except UnicodeDecodeError:
            raise ConvertError("chat_template.jinja is not UTF-8 text.") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _object(files, name).get("chat_template")
        if isinstance(template, str):
            return template
        if isinstance(template, list):  # several, by name
            for entry in template:
                if isinstance(entry, dict) and entry.get("name") == "default":
                    found = entry.get("template")
                    return found if isinstance(found, str) else None
    return None


def end_tokens(files: dict[str, bytes], config: dict[str, Any], notes: list[str]) -> list[int]:
    """The ids that end a generation: those of the configuration, and the chat template's.

    Raises:
        ConvertError: An ``eos_token_id`` is no whole number.
    """
    generation = _object(files, "generation_config.json")
    ids: list[int] = []
    for values in (generation.get("eos_token_id"), config.get("eos_token_id")):
        for value in values if isinstance(values, list) else [values]:
            if value is None or value in ids:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConvertError(f"eos_token_id must be whole numbers but is {values!r}.")
            ids.append(value)
    template = chat_template(files) or ""
    added = _object(files, "tokenizer.json").get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if not isinstance(token, dict) or not isinstance(token.get("id"), int):
            continue
        content = token.get("content")
        if content in TURN_ENDS and content in template and token["id"] not in ids:
            ids.append(token["id"])
            notes.append(f"eos_token_id: added {token['id']}, {content} ends a turn")
    return ids


def _object(files: dict[str, bytes], name: str) -> dict[str, Any]:
    """A JSON file's contents, or nothing."""
    if name not in files:
        return {}
    value = parse_json(files[name], name)
    return dict(value) if isinstance(value, dict) else {}
