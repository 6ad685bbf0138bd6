"""mlx-lm's own tests of caches, generation, models and the server, run on our classes."""

import dataclasses
import unittest
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import llama

from mlx_delta import DeltaKVCache

from .inject import SETTINGS, injected, load_demo
from .table import CODES, CODES_TOO, FILES, KNOWN_FAILURES, OTHER_ARCHITECTURES, OURS, STOCK
from .upstream import CannotFetch, fetch_tests, import_tests, list_tests


def runs(folder: Path) -> Iterator[object]:
    """Yield the parameters of :func:`test_mlx_lm`: each test, with each of our settings."""
    unseen = set(KNOWN_FAILURES) | OTHER_ARCHITECTURES
    for file, selected in FILES.items():
        for test in list_tests(folder / file):
            method = test.partition(".")[2]
            unseen.discard(method)
            if method in OTHER_ARCHITECTURES or selected is not None and method not in selected:
                continue
            known = KNOWN_FAILURES.get(method)
            settings = STOCK if known and known.settings == STOCK else OURS
            if settings == OURS and runs_coded(file, test):
                settings += CODES
            for setting in settings:
                name = f"{file.removesuffix('.py')}-{test}-{setting}"
                yield pytest.param(folder / file, test, setting, id=name)
    assert not unseen, f"mlx-lm has no tests {sorted(unseen)}"


def runs_coded(file: str, test: str) -> bool:
    """Whether a test is run with codes too."""
    selected = CODES_TOO.get(file, set())
    return selected is None or not selected.isdisjoint(test.split("."))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each of mlx-lm's tests an id of its own; one skipped test if there are none."""
    if metafunc.function is not test_mlx_lm:
        return
    try:
        parameters = list(runs(fetch_tests()))
    except CannotFetch as error:
        skip = pytest.mark.skip(reason=str(error))
        parameters = [pytest.param(None, None, None, marks=skip, id="not-fetched")]
    metafunc.parametrize(("file", "test", "setting"), parameters)


def test_mlx_lm(file: Path, test: str, setting: str):
    module = import_tests(file)
    class_name, method = test.split(".")
    mx.random.seed(0)
    with injected(module, SETTINGS[setting]):
        failure = failure_of(getattr(module, class_name)(method))
    known = KNOWN_FAILURES.get(method)
    if known and setting in known.settings and (failure or known.always):
        assert known.error in failure, f"should fail with {known.error!r}, but: {failure or 'ok'}"
        pytest.xfail(known.reason)
    if failure:
        pytest.fail(failure, pytrace=False)


def failure_of(test: unittest.TestCase) -> str:
    """Run one test with its class's set-up; returns its traceback, or "" if it passed."""
    result = unittest.TestResult()
    unittest.TestSuite([test]).run(result)
    for _, reason in result.skipped:
        pytest.skip(reason)
    return "\n".join(traceback for _, traceback in result.errors + result.failures)


@pytest.mark.parametrize("setting", OURS)
def test_left_padding_of_llama(setting: str):
    """mlx-lm's own check of left-padded batches, which it runs on two other models only."""
    try:
        module = import_tests(fetch_tests() / "test_models.py")
    except CannotFetch as error:
        pytest.skip(str(error))
    delta = SETTINGS[setting]
    if setting == "delta-on":
        delta = dataclasses.replace(delta, block_size=2, window=2)  # the prompts: 3 and 6 tokens
    mx.random.seed(0)
    with injected(module, delta):
        model = llama.Model(
            llama.ModelArgs(
                model_type="llama",
                hidden_size=64,
                num_hidden_layers=2,
                intermediate_size=128,
                num_attention_heads=4,
                num_key_value_heads=2,
                rms_norm_eps=1e-5,
                vocab_size=32,
            )
        )
        assert isinstance(model.make_cache()[0], DeltaKVCache)
        module.TestModels().left_padding_test_runner(model)


def tokens_and_logits(setting: str, **options: int) -> tuple[tuple[int, ...], mx.array]:
    """Twenty tokens that the demo model goes on with, and the logits that they come from."""
    model, tokenizer = load_demo(SETTINGS[setting])
    prompt = mx.array(tokenizer.encode("The night was dark, and the road was long. " * 4))
    tokens, logits = zip(*generate_step(prompt, model, max_tokens=20, **options), strict=True)
    return tokens, mx.stack(logits)


@pytest.mark.parametrize("prefill_step_size", [2048, 7])
def test_logits_are_those_of_mlx_lm_while_the_window_covers_all(prefill_step_size: int):
    expected_tokens, expected = tokens_and_logits("stock")
    tokens, logits = tokens_and_logits("window-covers-all", prefill_step_size=prefill_step_size)
    assert tokens == expected_tokens
    assert mx.allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_logits_are_others_with_the_delta_on():
    """Otherwise the runs above would show nothing."""
    _, expected = tokens_and_logits("stock")
    _, logits = tokens_and_logits("delta-on")
    assert not mx.allclose(logits, expected, rtol=1e-2, atol=1e-2)
