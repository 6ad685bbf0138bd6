"""The command line: the lines of the documentation, and errors that say what to do."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_delta.convert.__main__ import main

from . import checkpoints as made

DOCS = Path(__file__).parents[2] / "docs" / "convert.md"
WIDE = made.LLAMA | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
WIDE_BITNET = made.BITNET | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def make_sources(folder: Path) -> None:
    """The checkpoints that the documentation's lines name."""
    from .test_tokenizers import train

    made.write_llama(folder / "Llama-3.2-1B-Instruct", made.LLAMA3, shards=2)
    made.write_packed(folder / "bitnet-b1.58-2B-4T")
    made.write_llama(folder / "bitnet-b1.58-2B-4T-bf16", made.MASTER)
    made.write_packed(folder / "Falcon3-7B-Instruct-1.58bit", made.TERNARY_LLAMA)
    made.write_gguf(folder / "model-Q4_0.gguf", WIDE, "Q4_0", embedding="Q8_0")
    made.write_gguf(folder / "model-Q4_K_M.gguf", WIDE, "Q4_K", embedding="Q6_K")
    made.write_gguf(folder / "ggml-model-i2_s.gguf", WIDE_BITNET, "I2_S", arch="bitnet-b1.58")
    gemma = made.GEMMA | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    metadata = made.gguf_metadata(gemma, "gemma3") | {"gemma3.attention.sliding_window": 16}
    made.write_gguf(folder / "gemma-3-270m-Q4_K_M.gguf", gemma | {"num_hidden_layers": 6}, "Q4_K",
                    arch="gemma3", embedding="Q8_0",
                    metadata=metadata | {"gemma3.block_count": 6})  # fmt: skip
    made.write_llama(folder / "old-llama", made.LLAMA, tokenizer=False)
    (folder / "old-llama" / "tokenizer.model").write_bytes(train(folder / "old-llama"))
    main([str(folder / "Llama-3.2-1B-Instruct"), "-o", str(folder / "Llama-4bit"), "--no-verify",
          "--quiet"])  # fmt: skip


def test_every_line_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    make_sources(tmp_path)
    capsys.readouterr()
    section = DOCS.read_text().split("## One line for each source")[1].split("\n## ")[0]
    lines = re.findall(r"^python -m mlx_delta\.convert (.+)$", section, re.MULTILINE)
    assert len(lines) >= 8
    monkeypatch.chdir(tmp_path)
    for line in lines:
        assert main([*shlex.split(line, comments=True), "--no-verify"]) == 0, (
            line,
            capsys.readouterr().err,
        )
        assert "bits a weight" in capsys.readouterr().out


def test_a_line_with_its_comparison_in_a_fresh_process(tmp_path):
    made.write_packed(tmp_path / "bitnet-b1.58-2B-4T")
    done = subprocess.run(
        [sys.executable, "-m", "mlx_delta.convert", "bitnet-b1.58-2B-4T", "--target", "iphone"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"verified: KL 0\.\d+, top-1 agreement \d+\.\d%", done.stdout)
    assert (tmp_path / "bitnet-b1.58-2B-4T-iphone" / "config.json").is_file()


def broken(folder: Path) -> None:
    made.write_llama(folder / "good")
    made.write_gguf(folder / "two" / "a.gguf")
    made.write_gguf(folder / "two" / "b.gguf")
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("x")
    made.write_llama(
        folder / "gptq", made.LLAMA | {"quantization_config": {"quant_method": "gptq"}}
    )
    made.write_llama(folder / "qwen", made.LLAMA | {"model_type": "qwen2"})
    made.write_llama(folder / "relu", made.LLAMA | {"hidden_act": "relu"})
    made.write_llama(folder / "none", tokenizer=False)
    made.write_llama(folder / "rope", made.LLAMA | {"rope_parameters": {"rope_theta": 5.0}})
    made.write_gguf(folder / "old.gguf", arch="bitnet")
    made.write_gguf(folder / "split.gguf", metadata=made.gguf_metadata(made.LLAMA, "llama")
                    | {"split.count": 2})  # fmt: skip


@pytest.mark.parametrize(
    "line, expected",
    [
        ("nothing", "'nothing' does not exist, nor is it a hub name"),
        ("''", "the source's name is empty"),
        ("empty", "has no config.json and no .gguf file"),
        ("text.txt", "is a file but not GGUF"),
        ("two", "has 2 matching GGUF files; name one with --gguf-file"),
        ("two --gguf-file c.gguf", "has 0 matching GGUF files"),
        ("gptq", "is already quantized ('gptq')"),
        (
            "qwen",
            "has model_type 'qwen2'; converters exist for llama, mistral, bitnet, gemma3",
        ),
        ("relu", "has hidden_act 'relu'"),
        ("none", "has no tokenizer.json and no tokenizer.model; .* --tokenizer-from"),
        ("rope", "rope_theta is 10000.0 but rope_parameters has 5.0"),
        ("old.gguf", "has the architecture 'bitnet'; converters exist for llama, bitnet-b1.58"),
        ("split.gguf", "is one of several parts; merge them"),
        ("good --q-bits 7", "--q-bits must be one of"),
        ("good --embed-bits 1", "--embed-bits must be one of"),
        ("good --q-group-size 16", "--q-group-size must be one of"),
        ("good --shard-size x", "--shard-size must look like 1GB"),
        ("good --device-memory x", "--device-memory must look like 8GB"),
        ("good --max-context 0", "--max-context must be 1 or more"),
        ("good --delta '{'", "--delta is not valid JSON"),
        ("good --delta '{\"windows\": 1}'", "unknown setting 'windows'"),
        ("good --delta widnow=64", "unknown option 'widnow' (did you mean window"),
        ("good --delta window=1", "window must be a multiple of block_size"),
        ("good --delta '{\"window\": 1}'", "window must be a multiple of block_size"),
        ("good --ternary packed", "--ternary packed is for bitnet models"),
        ("good -o good", "holds the source; choose another -o"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(line, expected, tmp_path, monkeypatch, capsys):
    broken(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(line), "--no-verify"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert re.search(expected.replace("(", r"\(").replace(")", r"\)"), errors), errors
    assert not list(tmp_path.glob("*.partial"))


def test_a_hub_name_fetches_the_models_files(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(made.write_llama(tmp_path / "cache"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    assert main(["owner/tiny", "--revision", "main", "--no-verify", "--quiet"]) == 0
    assert asked["name"] == "owner/tiny" and asked["revision"] == "main"
    assert "model*.safetensors" in asked["allow_patterns"]
    assert (tmp_path / "tiny-mac" / "config.json").is_file()


def test_links_as_in_the_hubs_cache_are_followed(run, tmp_path):
    blobs = made.write_llama(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / file.name)
    output, _ = run(snapshot)
    assert not any(path.is_symlink() for path in output.iterdir())


def test_the_gguf_package_reads_what_is_read_here(tmp_path):
    import gguf

    from mlx_delta.convert.gguf_header import read_header

    file = made.write_gguf(tmp_path / "m.gguf", WIDE, "Q4_K", embedding="Q8_0")
    metadata, tensors = read_header(file)
    reader = gguf.GGUFReader(file)
    assert {t.name for t in reader.tensors} == set(tensors)
    for tensor in reader.tensors:
        ours = tensors[tensor.name]
        assert ours.start == tensor.data_offset and ours.nbytes == tensor.n_bytes
        assert list(ours.shape) == list(reversed(tensor.shape.tolist()))
        assert ours.type == tensor.tensor_type.name
    for key, value in metadata.items():
        assert reader.fields[key].contents() == value


def test_the_readme_shows_lines_that_are_tested():
    """The lines of docs/convert.md are run above; what the README shows is one of them."""
    shown = [
        line
        for line in (DOCS.parents[1] / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("python -m mlx_delta.convert ")
    ]
    assert shown and set(shown) <= set(DOCS.read_text(encoding="utf-8").splitlines())


def words(*line: str) -> tuple[str, str]:
    """What a command line makes of source and output."""
    from mlx_delta.convert.options import make_job, make_parser

    job = make_job(make_parser().parse_args(line))
    return job.source, str(job.output)


def test_mlx_lms_own_words_mean_the_same():
    from mlx_delta.convert.options import make_job, make_parser

    assert words("--hf-path", "a/b", "--mlx-path", "c", "-q") == ("a/b", "c")
    assert words("--model", "a/b", "--quantize") == words("a/b") == ("a/b", "b-mac")
    line = ["--hf-path", "a", "-q", "--q-bits", "8", "--q-group-size", "32", "--q-mode", "affine"]
    options = make_job(make_parser().parse_args(line)).options
    assert (options.bits, options.group_size) == (8, 32)
    options = make_job(make_parser().parse_args(["--hf-path", "a", "-d"])).options
    assert options.bits is options.embed_bits is None


@pytest.mark.parametrize(
    "line, expected",
    [
        ("", "name the model to convert"),
        ("--model a b", "two sources are named, 'b' and 'a'"),
        ("a --q-mode mxfp4", "--q-mode must be affine but is 'mxfp4'"),
        ("a -d -q", "--dequantize leaves nothing quantized"),
        ("a --device-memory 1MB", "--device-memory must look like 8GB and be from 512MB"),
        ("parts", "holds the 2 parts of one model; merge them"),
        ("parts/m-00001-of-00002.gguf", "is one of 2 parts; merge them"),
        ("some", "holds 2 of the 3 parts of one model, without part 2; fetch all"),
        ("stale", "holds model.safetensors and an index of other files; remove"),
        ("good --tokenizer-from text.txt", "is no tokenizer: --tokenizer-from takes"),
        ("good --tokenizer-from large", "has ids up to 999 but the embedding has only 384 rows"),
        ("gemma --mlx-lm-shim", "--mlx-lm-shim is for llama and bitnet models"),
    ],
)
def test_more_errors_of_one_line(line, expected, tmp_path, monkeypatch, capsys):
    import json

    made.write_llama(tmp_path / "good")
    made.write_llama(tmp_path / "gemma", made.GEMMA)
    (tmp_path / "text.txt").write_text("x")
    for folder, count, numbers in (("parts", 2, (1, 2)), ("some", 3, (1, 3))):
        for number in numbers:
            metadata = made.gguf_metadata(made.LLAMA, "llama") | {"split.count": count}
            name = f"m-{number:05d}-of-{count:05d}.gguf"
            made.write_gguf(tmp_path / folder / name, metadata=metadata)
    stale = made.write_llama(tmp_path / "stale", shards=2)
    (stale / "model.safetensors").write_bytes(
        (tmp_path / "good" / "model.safetensors").read_bytes()
    )
    (tmp_path / "large").mkdir()
    made.write_tokenizer(tmp_path / "large", 384)
    (tmp_path / "large" / "added_tokens.json").write_text(json.dumps({"x": 999}))
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(line), "--no-verify"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert expected in errors


@pytest.mark.parametrize("given", ["folder", "folder/tokenizer.json", "folder/other.json"])
def test_a_tokenizer_comes_from_a_folder_without_a_model_or_from_a_file(given, run, tmp_path):
    from .test_tokenizers import byte_level, gpt2_metadata

    folder = tmp_path / "folder"
    folder.mkdir()
    made.write_tokenizer(folder, 384)
    (folder / "other.json").write_bytes((folder / "tokenizer.json").read_bytes())
    metadata = made.gguf_metadata(made.LLAMA, "llama") | gpt2_metadata(byte_level(), "new-rule")
    source = made.write_gguf(tmp_path / "m.gguf", metadata=metadata)
    output, _ = run(source, reading={"tokenizer_from": str(tmp_path / given)})
    assert (output / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_hub_name_for_the_tokenizer_fetches_no_weights(run, tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        (tmp_path / "cache").mkdir()
        made.write_tokenizer(tmp_path / "cache", 384)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    run(made.write_llama(tmp_path / "m"), reading={"tokenizer_from": "owner/name"})
    assert asked["name"] == "owner/name" and "tokenizer.json" in asked["allow_patterns"]
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"])


def test_check_alone_says_what_it_wants(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["check"])
    assert "required: directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, expected", [("8GB", 8), ("8", 8), ("8192 MB", 8), ("1tb", 1024), ("512MiB", 0.5)]
)
def test_memory_is_read_in_every_unit(text, expected):
    from mlx_delta.convert.targets import parse_memory

    assert parse_memory(text) == expected


def test_every_option_with_a_default_says_it():
    from mlx_delta.convert.options import make_parser

    for action in make_parser()._actions:
        takes_value = action.option_strings and action.nargs != 0 and action.dest != "model"
        if takes_value and action.dest != "gguf_file":
            assert "default" in action.help, action.option_strings


def test_what_to_do_about_gguf_files_where_a_model_is_expected(tmp_path):
    from mlx_delta.convert.gguf_files import gguf_advice

    assert gguf_advice(tmp_path) is None
    one = tmp_path / "a.gguf"
    one.write_bytes(b"")
    assert "python -m mlx_delta.convert" in gguf_advice(one)
    assert gguf_advice(tmp_path).startswith("holds a GGUF file")
    (tmp_path / "b.gguf").write_bytes(b"")
    assert "--gguf-file a.gguf" in gguf_advice(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert gguf_advice(tmp_path) is None
