"""Settings: validation, the paper's preset, and the round trip through a config.json."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_delta import DeltaConfig

valid = st.builds(
    lambda window_blocks, block_size, runs, **rest: DeltaConfig(
        window=window_blocks * block_size,
        block_size=block_size,
        keyframes=runs[0],
        run_value=runs[1],
        **rest,
    ),
    window_blocks=st.integers(0, 8),
    block_size=st.integers(1, 256),
    threshold=st.floats(0, 10)
    | st.lists(
        st.floats(0, 10) | st.lists(st.floats(0, 10), min_size=1, max_size=3),
        min_size=1,
        max_size=4,
    ),
    threshold_mode=st.sampled_from(["relative", "absolute"]),
    sinks=st.integers(0, 300),
    runs=st.sampled_from([(True, "mean"), (True, "first"), (False, "first")]),
)


@given(valid)
def test_a_setting_survives_its_config_json(config):
    restored = DeltaConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert restored == config and hash(restored) == hash(config)


def test_a_config_json_without_what_runs_are_held_as_takes_the_default():
    values = DeltaConfig().to_dict()
    assert values.pop("run_value") == "mean"
    assert DeltaConfig.from_dict(values) == DeltaConfig()


@pytest.mark.filterwarnings("ignore:.*as it was before formats")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": -1.0}, r"threshold must be >= 0 but got -1\.0"),
        ({"threshold": float("nan")}, "threshold must be >= 0 but got nan"),
        ({"threshold": float("inf")}, "threshold must be >= 0 but got inf"),
        ({"threshold": [1.0, -2.0]}, r"threshold must be >= 0 but got -2\.0"),
        ({"threshold": []}, "threshold must not be or contain an empty list"),
        ({"threshold": [1.0, []]}, "threshold must not be or contain an empty list"),
        ({"threshold": [1.0, [1.0, -2.0]]}, r"threshold must be >= 0 but got -2\.0"),
        ({"threshold": [[1.0, [2.0]]]}, r"threshold must be a number but got \(2\.0,\)"),
        ({"threshold": "1"}, "threshold must be a number but got '1'"),
        ({"threshold_mode": "absolut"}, "threshold_mode must be .* but got 'absolut'"),
        ({"block_size": 0}, "block_size must be >= 1 but got 0"),
        ({"block_size": 6.5}, r"block_size must be a whole number but got 6\.5"),
        ({"window": 65}, r"window must be a multiple of block_size \(64\) but got 65"),
        ({"window": -64}, "window must be >= 0 but got -64"),
        ({"sinks": -1}, "sinks must be >= 0 but got -1"),
        ({"keyframes": 1}, "keyframes must be true or false but got 1"),
        ({"run_value": "median"}, "run_value must be 'mean' or 'first' but got 'median'"),
        ({"keyframes": False}, "keyframes=False needs run_value='first' but got run_value='mean'"),
        ({"block_fraction": 1.5, "window": 0}, r"block_fraction must be in \(0, 1\] but got 1\.5"),
        ({"block_fraction": 0.05}, "block_fraction needs window=0 but got window=64"),
        ({"window": 10**9}, "window must be <= 16777216 but got 1000000000"),
        ({"block_size": 10**30, "window": 0}, "block_size must be <= 16777216 but got 1000000"),
        ({"threshold": 10**400}, "threshold must be >= 0 but got 1000"),
        ({"key_bits": 7.5}, r"between 2 and 7, with key_format='deltas', but got 7\.5; key_fo"),
        ({"key_bits": True}, "key_bits must be between 2 and 7"),
        ({"value_format": "rotated", "key_bits": 4}, "value_bits must be between 2 and 8"),
        ({"key_bits": 4, "value_bits": 1}, "value_bits must be between 2 and 8"),
        ({"key_bits": 4, "value_bits": 9}, "value_bits must be between 2 and 8"),
        (
            {
                "key_format": "codes",
                "key_bits": 4,
                "block_size": 128,
                "window": 128,
                "threshold": 1.0,
            },
            "up to 64, but got 128",
        ),
        (
            {"key_format": "codes", "key_bits": 4, "window": 0, "block_fraction": 0.05},
            "a fixed blo",
        ),
        ({"block_fraction": True, "window": 0}, r"block_fraction must be in \(0, 1\] but got True"),
        ({"treshold": 1.0}, "unknown setting 'treshold'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_value_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        DeltaConfig.from_dict(values)


@pytest.mark.parametrize(
    ("prompt", "block"), [(1, 1), (10, 1), (20, 1), (30, 2), (100, 5), (1024, 51)]
)
def test_the_papers_window_is_five_percent_of_the_prompt(prompt, block):
    config = DeltaConfig.paper().resolve(prompt)
    assert (config.block_size, config.window, config.keyframes) == (block, 0, False)
    assert config.run_value == "first"
    assert config.resolve(7) == config, "fixed once the prompt was seen"


def test_each_layer_takes_its_own_threshold():
    config = DeltaConfig(threshold=(0.5, 1.5))
    assert [config.for_layer(i, 2).threshold for i in range(2)] == [0.5, 1.5]
    with pytest.raises(ValueError, match="threshold has 2 values but the model has 3 layers"):
        config.for_layer(0, 3)


def test_heads_of_a_layer_take_their_own_thresholds():
    config = DeltaConfig(threshold=(0.5, (1.0, 1.5)))
    first, second = (config.for_layer(i, 2) for i in range(2))
    assert (first.layer_threshold, second.layer_threshold) == (0.5, (1.0, 1.5))
    assert [layer.for_head(1).head_threshold for layer in (first, second)] == [0.5, 1.5]
    assert second.for_layer(0, 1) == second, "the setting of a layer is one of a single layer"


def test_a_setting_is_not_taken_for_one_of_a_layer_or_head():
    config = DeltaConfig(threshold=((0.5, 0.5), (1.0, 1.5)))
    with pytest.raises(ValueError, match="thresholds per layer: call for_layer first"):
        config.check_heads(2)
    with pytest.raises(ValueError, match="thresholds per head: call for_head first"):
        _ = config.for_layer(1, 2).head_threshold


def test_another_number_of_heads_is_named():
    config = DeltaConfig(threshold=((0.5, 0.5, 0.5),))
    config.check_heads(3)
    with pytest.raises(ValueError, match="3 values for the heads of layer 7 but it has 2 kv heads"):
        config.check_heads(2, 7)


# One way to write a setting down.


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("", {}),
        ("value_bits=16,threshold=1.1", {"value_bits": 16, "threshold": 1.1}),
        ("keyframes=false, run_value=first", {"keyframes": False, "run_value": "first"}),
        ("threshold=0.9/1.1", {"threshold": (0.9, 1.1)}),
        ("threshold=0.9/", {"threshold": (0.9,)}),
        ("threshold=0.9:1.1/1/2:3", {"threshold": ((0.9, 1.1), 1, (2, 3))}),
        ("threshold=1e-05:/", {"threshold": ((1e-05,),)}),
        ("block_fraction=0.05,window=0", {"block_fraction": 0.05, "window": 0}),
    ],
)
def test_a_setting_is_written_and_read_alike(text, fields):
    config = DeltaConfig.parse(text)
    assert config == DeltaConfig(**fields)
    assert DeltaConfig.parse(str(config)) == config


def test_what_is_not_written_stays_as_it_was():
    base = DeltaConfig(threshold=2.0, key_format="codes", key_bits=8)
    assert DeltaConfig.parse("key_bits=none", base) == DeltaConfig(threshold=2.0)
    assert str(DeltaConfig(value_bits=16, threshold=1.1)) == "threshold=1.1,value_bits=16"
    assert str(DeltaConfig()) == ""


CODED = DeltaConfig(key_format="codes", key_bits=4, value_bits=3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("key_format=held", ""),
        ("key_bits=none", ""),
        ("key_format=held,value_bits=16", "value_bits=16"),
        ("value_format=plain", "key_bits=4,key_format=codes"),
        ("value_bits=16", "key_bits=4,value_bits=16,key_format=codes"),
        ("key_format=deltas", "key_bits=4,value_bits=3,key_format=deltas"),
        ("key_bits=5", "key_bits=5,value_bits=3,key_format=codes"),
    ],
)
def test_of_a_format_and_its_bits_one_is_enough_to_change_both(text, expected):
    assert str(DeltaConfig.parse(text, CODED)) == expected


@pytest.mark.parametrize("base", [CODED, DeltaConfig()], ids=["codes", "in-full"])
@pytest.mark.parametrize("text", ["key_format=held,key_bits=4", "value_format=plain,value_bits=3"])
def test_a_format_in_full_and_bits_contradict_each_other(base, text):
    with pytest.raises(ValueError, match=r"_format='.*' and .*_bits=. contradict each other"):
        DeltaConfig.parse(text, base)


@given(
    threshold=st.one_of(
        st.floats(0, 1e6),
        st.lists(
            st.one_of(st.floats(0, 10), st.lists(st.floats(0, 10), min_size=1, max_size=3)),
            min_size=1,
            max_size=3,
        ),
    ),
    blocks=st.integers(0, 3),
    bits=st.sampled_from([None, 8, 4, 2.5]),
    mode=st.sampled_from(["relative", "absolute"]),
)
def test_every_setting_can_be_written_down(threshold, blocks, bits, mode):
    fields = {"key_format": "held" if bits is None else "codes", "key_bits": bits}
    config = DeltaConfig(threshold, mode, 16, 16 * blocks, **fields, value_bits=bits)
    assert DeltaConfig.parse(str(config)) == config
    assert DeltaConfig.parse(str(config), DeltaConfig()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("treshold=1", "unknown option 'treshold' (did you mean threshold"),
        ("key_bits", "key_bits lacks a value, as in key_bits=1."),
        ("key_bits=", "key_bits lacks a value"),
        ("key_bits=4,key_bits=8", "key_bits is given twice"),
        (
            "key_bits=five",
            "key_bits must be between 2 and 7, with key_format='deltas', but got 'five'",
        ),
        ("threshold=1/x", "threshold must be a number but got 'x'"),
        ("threshold=/", "threshold must be a number but got ''"),
        ("threshold=1//2", "threshold must be a number but got ''"),
        ("threshold=nan", "threshold must be >= 0 but got nan"),
        (",", "unknown option ''"),
    ],
)
def test_a_wrongly_written_setting_is_refused_by_name(text, message):
    with pytest.raises(ValueError) as error:
        DeltaConfig.parse(text)
    assert message in str(error.value) and str(error.value).startswith("[DeltaConfig] ")


# Only bits, and forms that are gone.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key_bits": 16}, "key_bits must be between 2 and 7, .* but got 16"),
        ({"key_bits": 4, "keyframes": False, "run_value": "first"}, "needs keyframes=True"),
        ({"value_bits": 4}, "value_bits=4 needs key_bits but got None: .* or value_bits=16"),
    ],
)
def test_bits_that_no_format_has_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DeltaConfig(**fields)


@pytest.mark.filterwarnings("ignore:.*with a threshold. keys are codes:UserWarning")
def test_bits_beside_a_threshold_are_codes():
    """As programs of earlier versions write it, whose keys were packed then."""
    found = DeltaConfig(threshold=1.1, key_bits=4, value_bits=4)
    assert (found.key_format, found.value_format) == ("codes", "rotated")


def test_bits_alone_say_the_formats():
    config = DeltaConfig(key_bits=4, value_bits=3)
    assert (config.key_format, config.value_format) == ("deltas", "rotated")
    assert (
        config
        == DeltaConfig.parse("key_bits=4,value_bits=3")
        == DeltaConfig(key_bits=4, key_format="deltas", value_bits=3, value_format="rotated")
    )
    assert config.changed(key_format="codes", key_bits=3.5).key_format == "codes"
    plain = config.changed(value_bits=16)
    assert (plain.value_bits, plain.value_format) == (16, "plain")
    full = config.changed(key_bits=None, value_bits=None)
    assert full == DeltaConfig() and DeltaConfig.from_dict(config.to_dict()) == config


OLD = [
    ({"key_bits": 4, "value_bits": 4}, {"key_bits": 4, "value_bits": 4}, "'deltas' of 4 .*rotated"),
    ({"key_bits": 8}, {"key_bits": 7}, "key_bits=8 is key_format='deltas' of 7 bits"),
    ({"key_bits": 16, "value_bits": 16}, {"value_bits": 16}, "key_bits=16 are kept in full"),
    ({"key_bits": 2, "threshold": 1.1}, {"threshold": 1.1}, "keys of key_bits=2 are kept in full"),
    ({"key_bits": 4, "threshold_mode": "absolute", "value_bits": 8, "threshold": 1.0},
     {"threshold_mode": "absolute", "threshold": 1.0, "value_bits": 16}, "full, .* are 16 bits"),
    ({"value_bits": 8}, {"value_bits": 16}, "values of value_bits=8 are 16 bits"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "fields", "message"), OLD, ids=str)
def test_a_setting_in_a_form_that_is_gone_loads_in_the_nearest_one(old, fields, message):
    with pytest.warns(UserWarning, match=r"^\[DeltaConfig\] a setting .*" + message) as said:
        assert DeltaConfig.from_dict(old) == DeltaConfig(**fields)
    assert len(said) == 1


def test_a_setting_of_today_is_read_without_a_word(recwarn):
    for fields in ({"key_bits": 3.5}, {"key_bits": 4, "key_format": "codes", "value_bits": 8}):
        config = DeltaConfig(**fields)
        assert DeltaConfig.from_dict(config.to_dict()) == config
    assert not recwarn.list
