"""The files that go along with the weights: tokenizer, chat template, generation settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import ConvertError
from .files import MAX_JSON_BYTES, dump_json, parse_json, read_bytes

# Copied as they are when they are there.
JSON_FILES = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json")
OTHER_FILES = ("tokenizer.model",)
TOKENIZER_FILES = (
    *JSON_FILES,
    *OTHER_FILES,
    "tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)
# Names that swift-transformers and transformers 4 know, for those of transformers 5.
TOKENIZER_CLASSES = {
    "TokenizersBackend": "PreTrainedTokenizerFast",
    "PreTrainedTokenizer": "PreTrainedTokenizerFast",
    "SentencePieceBackend": "LlamaTokenizer",
}
# Tokens that end a turn in chat templates and that a model's eos_token_id often lacks.
TURN_ENDS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
)


def read_tokenizer(path: Path) -> dict[str, bytes]:
    """The tokenizer files of a directory, by name.

    Where there is only a sentencepiece ``tokenizer.model``, a ``tokenizer.json`` is built.

    Args:
        path: The directory, or the one of its files that holds the tokenizer; what stands beside
            it goes along, but for another tokenizer.

    Raises:
        ConvertError: There is no tokenizer, or a file of it is broken.
    """
    folder, chosen = (path.parent, path) if path.is_file() else (path, None)
    others = ("tokenizer.json", "tokenizer.model") if chosen else ()
    files: dict[str, bytes] = {}
    for name in (*JSON_FILES, "tokenizer_config.json", "chat_template.json"):
        file = folder / name
        if name not in others and (file.exists() or file.is_symlink()):
            files[name] = read_object(file)
    for name in (*OTHER_FILES, "chat_template.jinja"):
        file = folder / name
        if name not in others and (file.exists() or file.is_symlink()):
            files[name] = read_bytes(file, MAX_JSON_BYTES)
    if chosen is not None:
        if chosen.suffix == ".json":
            files["tokenizer.json"] = read_object(chosen)
        else:
            files["tokenizer.model"] = read_bytes(chosen, MAX_JSON_BYTES)
    if "tokenizer.json" not in files:
        if "tokenizer.model" not in files:
            raise ConvertError(
                f"{folder} has no tokenizer.json and no tokenizer.model; give the directory of "
                "the original model with --tokenizer-from."
            )
        from .sentencepiece_model import build_tokenizer

        where = str(chosen or folder / "tokenizer.model")
        built = build_tokenizer(files["tokenizer.model"], where)
        old = _object(files, "tokenizer_config.json")
        files["tokenizer.json"] = built["tokenizer.json"]
        new = parse_json(built["tokenizer_config.json"], "tokenizer_config.json")
        # What the model's own file says stays, but for the class: it may name a slow one.
        new = {**new, **old, "tokenizer_class": new["tokenizer_class"]}
        files["tokenizer_config.json"] = dump_json(new)
    return files


def read_object(file: Path) -> bytes:
    """A file that holds a JSON object, as it is.

    Raises:
        ConvertError: It does not.
    """
    data = read_bytes(file, MAX_JSON_BYTES)
    if not isinstance(parse_json(data, str(file)), dict):
        raise ConvertError(f"{file} must hold a JSON object.")
    return data


def check_tokenizer(files: dict[str, bytes], vocab: int, where: str) -> None:
    """Refuse a tokenizer that can't be read, or has ids without a row in the embedding.

    Args:
        files: Contents by name.
        vocab: Rows of the embedding.
        where: What to call the tokenizer in an error.

    Raises:
        ConvertError: It is one of these.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        ids = list(tokenizer.get_vocab(with_added_tokens=True).values())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exceptions, and panics, which are none
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConvertError(f"{where}: tokenizer.json can't be read: {reason[:200]}.") from None
    added = _object(files, "added_tokens.json").values()
    named = _object(files, "tokenizer_config.json").get("added_tokens_decoder")
    ids += [i for i in added if isinstance(i, int)]
    ids += [int(i) for i in (named if isinstance(named, dict) else {}) if i.isdecimal()]
    if ids and max(ids) >= vocab:
        raise ConvertError(
            f"{where}: the tokenizer has ids up to {str(max(ids))[:20]} but the embedding has only "
            f"{vocab} rows; it does not belong to this model: give the right one with "
            "--tokenizer-from."
        )


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
