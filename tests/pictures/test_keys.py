"""The picture of a head's keys shows what the reference holds; pictures made from a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import gpt_neox

matplotlib = pytest.importorskip("matplotlib")

from mlx_delta import DeltaConfig, measure_sparsity  # noqa: E402
from mlx_delta.cache import DeltaKVCache  # noqa: E402
from mlx_delta.measure.settings import parse_setting  # noqa: E402
from mlx_delta.method.attention import delta_keys, hold, hybrid_attention  # noqa: E402
from mlx_delta.models.anatomy import watched_caches  # noqa: E402
from mlx_delta.models.any import apply  # noqa: E402
from mlx_delta.pictures import command, keys  # noqa: E402
from mlx_delta.pictures.record import record_head  # noqa: E402
from mlx_delta.pictures.theme import LIGHT  # noqa: E402
from tests.pictures.test_pictures import drawn, texts  # noqa: E402
from tests.tiny import SMALL, bitnet_model, llama_model, tokens, write_llama  # noqa: E402


@pytest.fixture(scope="module")
def recorded() -> tuple[Any, list[int], Any]:
    """A model, a text, and the record of its layer 1, kv head 1."""
    model = llama_model()
    ids = tokens(77, seed=3)[0].tolist()
    return model, ids, record_head(model, ids, parse_setting("delta", SMALL), 1, 1)


def test_the_held_mask_is_the_references(recorded: tuple[Any, list[int], Any]):
    model, ids, record = recorded
    delta = delta_keys(hold(record.keys, SMALL), SMALL)
    far = (76 // 8 - 2) * 8
    assert record.far == far == 56
    # The hold starts anew at each block's first token, and at the three sinks.
    anew = (np.arange(77) % 8 == 0) | (np.arange(77) < 3)
    expected = (delta == 0) & ~anew[:, None]
    np.testing.assert_array_equal(record.held[:far], expected[:far])
    assert record.zero_share == pytest.approx(expected[:far].mean())
    # The caches of a prefill count as many zeros.
    caches = parse_setting("delta", SMALL).make_caches(model)
    model(tokens(77, seed=3), cache=caches)
    assert isinstance(caches[1], DeltaKVCache)
    assert int(np.array(caches[1].zeros[0, 1, : far // 8]).sum()) == expected[:far].sum()
    assert record.sparsity == pytest.approx(measure_sparsity(caches, 77).prefill_heads[1, 1])


def test_a_bitnets_zeros_are_those_of_its_caches():
    model, ids = bitnet_model(), tokens(50)[0].tolist()
    record = record_head(model, ids, parse_setting("delta", SMALL), 2, 0)
    caches = parse_setting("delta", SMALL).make_caches(model)
    model(tokens(50), cache=caches)
    blocks = record.far // 8
    assert blocks == 4
    zeros = int(np.array(caches[2].zeros[0, 0, :blocks]).sum())
    # Keys computed a second time may round to the other side of a threshold.
    assert abs(int(record.held[: record.far].sum()) - zeros) <= 1


def test_the_attention_map_is_the_references(recorded: tuple[Any, list[int], Any]):
    model, ids, record = recorded
    layer = model.layers[1].self_attn
    assert type(layer).__name__ == "Attention"  # put back
    # The output of hybrid attention with values that name their token is the map itself.
    heard: list[Any] = []

    def listen(queries: Any, *args: Any) -> None:
        heard.append(np.array(queries[0]))

    import mlx_delta.models.common as common

    original = common.delta_attention

    def spy(queries: Any, keys: Any, values: Any, cache: Any, scale: float, mask: Any) -> Any:
        listen(queries)
        return original(queries, keys, values, cache, scale, mask)

    common.delta_attention = spy
    try:
        model(tokens(77, seed=3), cache=parse_setting("delta", SMALL).make_caches(model))
    finally:
        common.delta_attention = original
    maps = [
        hybrid_attention(q, record.keys, np.eye(77, dtype=np.float32), SMALL, layer.scale)
        for q in heard[1][2:4]
    ]
    np.testing.assert_allclose(record.attention, np.mean(maps, axis=0), atol=2e-5)


def test_the_keys_picture_shows_held_changed_and_kept(recorded: tuple[Any, list[int], Any]):
    _, _, record = recorded
    colors = keys.matrix_colors(record, LIGHT)  # [D, N, 3]
    assert colors.shape == (16, 77, 3)

    def is_color(color: str) -> np.ndarray:
        return np.isclose(colors, matplotlib.colors.to_rgb(color), atol=1e-6).all(axis=2).T

    np.testing.assert_array_equal(is_color(LIGHT.ramp[0])[:56], record.held[:56])
    np.testing.assert_array_equal(is_color(LIGHT.accents[1])[:56].all(axis=1), record.exact[:56])
    assert is_color(LIGHT.grid)[56:].all() and not is_color(LIGHT.grid)[:56].any()
    figure = drawn(lambda page: keys.draw_keys(record, page, "tiny", ["x"] * 77, "a text"))
    said = texts(figure)
    for part in (
        "tiny, layer 1, kv head 1",
        "Threshold 1 × spread",
        f"{record.zero_share:.1%} of the far deltas",
        "mean of its 2 query heads",
        "a text",
    ):
        assert part in said
    attention, matrix = figure.axes[:2]
    assert attention.get_xlim() == matrix.get_xlim() == (-0.5, 76.5)


def test_the_border_of_held_keys_is_where_queries_stop_seeing_full_ones(
    recorded: tuple[Any, list[int], Any],
):
    _, _, record = recorded
    xs, ys = keys.staircase(record)
    # Query 40 (block 5) sees blocks 3 to 5 in full: the border runs at key 24 from there on.
    assert (23.5, 39.5) in zip(xs, ys, strict=True)
    assert (23.5, 47.5) in zip(xs, ys, strict=True)
    assert max(xs) == 55.5 and max(ys) == 76.5


def test_a_range_shows_its_tokens(recorded: tuple[Any, list[int], Any]):
    _, _, record = recorded
    words = [f"t{i}$" for i in range(77)]
    figure = drawn(lambda page: keys.draw_keys(record, page, "tiny", words, "a text", (20, 30)))
    attention = figure.axes[0]
    assert attention.get_xlim() == (19.5, 29.5)
    labels = [label.get_text() for label in attention.get_xticklabels()]
    assert labels == [f"t{i}\\$" for i in range(20, 30)]


def test_a_long_text_is_pooled():
    values = np.arange(1300.0)[None]
    pooled = keys._pooled(values, 1, np.max)
    assert pooled.shape == (1, 434)
    np.testing.assert_array_equal(pooled[0, :-1], np.arange(433) * 3 + 2)
    assert pooled[0, -1] == 1299


@pytest.mark.parametrize(
    ("setting", "length", "layer", "head", "message"),
    [
        ("delta", 77, 3, 0, "layer must be 0 to 2 but got 3"),
        ("delta", 77, 0, 2, "kv head must be 0 to 1 but got 2"),
        ("delta", 24, 0, 0, "24 tokens are all within the exact window; give more than 24"),
        ("kv8", 77, 0, 0, "'kv8' holds no keys"),
    ],
)
def test_records_that_can_not_be(setting: str, length: int, layer: int, head: int, message: str):
    ids = tokens(length)[0].tolist()
    with pytest.raises(ValueError, match=message):
        record_head(llama_model(), ids, parse_setting(setting, SMALL), layer, head)


def test_a_model_whose_projections_have_other_names():
    """GPT-NeoX: queries, keys and values are one matrix, and rotated in part."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    config = {"model_type": "gpt_neox", "vocab_size": 256, "rotary_emb_base": 10000, **sizes}
    config |= {"max_position_embeddings": 512, "layer_norm_eps": 1e-5, "rotary_pct": 0.5}
    model = gpt_neox.Model(gpt_neox.ModelArgs.from_dict(config))
    apply(model, SMALL)
    ids = (tokens(60)[0] % 256).tolist()
    seen = []
    caches = watched_caches(model, lambda layer, q, k, scale: seen.append((layer, q, k, scale)))
    model(mx.array([ids]), cache=caches)
    _, queries, keys, scale = seen[0]  # the first layer's, which no held key has touched
    record = record_head(model, ids, parse_setting("delta", SMALL), 0, 2)
    np.testing.assert_allclose(record.keys, np.array(keys[0, 2]), atol=1e-5)
    assert record.query_heads == 1
    scores = np.array(queries[0, 2]) @ np.array(keys[0, 2]).T * scale
    scores = np.where(np.tri(60, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    near = slice(0, 24)  # queries whose window covers all
    np.testing.assert_allclose(record.attention[near], weights[near], atol=1e-5)


def test_thresholds_of_heads_are_their_own():
    config = dataclasses.replace(SMALL, threshold=((0.5, 1.5), 1.0, 1.0))
    ids = tokens(60)[0].tolist()
    records = [
        record_head(llama_model(delta=config), ids, parse_setting("delta", config), 0, head)
        for head in (0, 1)
    ]
    assert [record.config.head_threshold for record in records] == [0.5, 1.5]
    assert records[0].zero_share < records[1].zero_share


# From a model directory, on the command line.


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_llama(tmp_path_factory.mktemp("model") / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"delta": SMALL.to_dict()}))
    return folder


def test_keys_and_heads_of_a_model(model_dir: Path, tmp_path: Path):
    common = ["--model", str(model_dir), "--tokens", "64", "--theme", "light"]
    assert command.main(["keys", *common, "--ask", " why?", "-o", str(tmp_path / "k.png")]) == 0
    assert command.main(["heads", *common, "-o", str(tmp_path / "h.svg")]) == 0
    assert (tmp_path / "k-light.png").stat().st_size > 10_000
    content = (tmp_path / "h-light.svg").read_text()
    assert "delta (θ 1.0): mean" in content and "the first 64 tokens of hound.txt" in content


def test_roofline_of_a_model(model_dir: Path, tmp_path: Path):
    flags = ["--settings", "dense", "rotating:64", "--chips", "M4 Pro", "--contexts", "128", "256"]
    output = str(tmp_path / "new" / "r.svg")
    args = ["roofline", "--model", str(model_dir), *flags, "-o", output, "--theme", "dark"]
    assert command.main(args) == 0
    content = (tmp_path / "new" / "r-dark.svg").read_text()
    assert (
        "273 GB/s" in content and "computed, not measured" in content and "rotating 64 ×" in content
    )


def test_the_paper_setting_of_a_short_text():
    config = DeltaConfig.paper(0.05)
    ids = tokens(100)[0].tolist()
    setting = dataclasses.replace(parse_setting("paper"), delta=config)
    record = record_head(llama_model(delta=config), ids, setting, 0, 0)
    assert record.config.block_size == 5 and record.far == 95
    assert record.exact.sum() == 1  # one chain: only the first key
