"""Kernels that a machine gets wrong, or does not compile, are left out; the others are used."""

from __future__ import annotations

import warnings

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.ops import proving
from mlx_delta.ops.launched import KernelRefusedError
from mlx_delta.ops.proving import itself, proven

KEYS = mx.random.normal((2, 3, 256, 32), key=mx.random.key(0))
SIZE = 64


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    monkeypatch.setattr(proving, "_tried", set())
    monkeypatch.setattr(proving, "_left_out", set())


class Calls:
    """A kernel and its operations, and who was asked with how many tokens."""

    def __init__(self, kernel, operations=lambda x: x * 2, numbers=itself):
        self.asked = []
        self._kernel, self._operations, self._numbers = kernel, operations, numbers

    def run(self, x=KEYS, size: int | None = SIZE, tokens=0, name="a_kernel"):
        def asked(who, give):
            def call(x):
                self.asked.append((who, x.shape[-2]))
                return give(x)

            return call

        pair = asked("kernel", self._kernel), asked("operations", self._operations)
        return proven(name, x, *pair, self._numbers, size, tokens)


def left_out(calls: Calls, message: str, **given) -> None:
    """It is left out with these words, once, and the operations do its work."""
    with pytest.warns(UserWarning, match=rf"\[kernels\] a_kernel is left out .*: {message}"):
        found = calls.run(**given)
    del calls.asked[:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = calls.run(**given)
    assert [who for who, _ in calls.asked] == ["operations"]
    assert mx.array_equal(found, again, equal_nan=True)


def test_a_right_kernel_is_tried_once_on_two_blocks_made_up():
    calls = Calls(lambda x: x * 2.01)
    for _ in range(2):
        assert mx.array_equal(calls.run(), KEYS * 2.01)
    assert calls.asked == [("kernel", 128), ("operations", 128), ("kernel", 256), ("kernel", 256)]


def test_attention_is_tried_on_the_text_itself_while_that_is_short():
    calls = Calls(lambda x: x * 2)
    calls.run(size=None, tokens=proving.LONGEST + 1)
    assert calls.asked == [("kernel", 256)]
    calls.run(size=None, tokens=proving.LONGEST)
    assert calls.asked[1:] == [("kernel", 256), ("operations", 256), ("kernel", 256)]


@pytest.mark.parametrize("factor", [0.0, 1.5, float("nan"), float("inf")])
def test_a_wrong_one_is_left_out(factor):
    left_out(Calls(lambda x: x * factor), "its numbers are others|some of its numbers are not")


@pytest.mark.parametrize("wrong", [float("nan"), 999.0, 0.0])
@pytest.mark.parametrize("tokens", [slice(0, 4), slice(124, 128)], ids=["first", "last"])
def test_one_that_is_wrong_at_an_edge_is_left_out(wrong, tokens):
    def kernel(x):
        found = np.array(x * 2)
        found[..., tokens, :] = wrong
        return mx.array(found)

    left_out(Calls(kernel), "")


def test_a_last_bit_may_decide_a_few_numbers_otherwise():
    def kernel(x):
        found = np.array(x * 2)
        found[..., 7, 3] *= 1.3
        return mx.array(found)

    Calls(kernel).run()
    assert not proving._left_out


def test_of_a_text_rounding_may_be_large_and_a_mistake_is_larger():
    Calls(lambda x: x * 2.5).run(size=None)
    assert not proving._left_out
    proving._tried.clear()
    left_out(Calls(lambda x: x[..., ::-1] * 2), "its numbers", size=None)


def test_all_numbers_are_compared():
    two = Calls(lambda x: [x, x[..., 0] * 0], lambda x: [x, x[..., 0]], lambda found: found)
    with pytest.warns(UserWarning, match="its numbers are others"):
        two.run()


def test_each_kernel_type_dimension_and_size_is_tried():
    calls = Calls(lambda x: x * 2)
    calls.run()
    for given in (
        {"name": "b"},
        {"size": 32},
        {"x": KEYS[..., :16]},
        {"x": KEYS.astype(mx.float16)},
    ):
        del calls.asked[:]
        calls.run(**given)
        assert len(calls.asked) == 3
        calls.run(**given)
        assert len(calls.asked) == 4


def test_numbers_that_are_not_finite_say_nothing_of_a_kernel():
    odd = mx.where(mx.arange(32) == 3, mx.nan, KEYS)
    calls = Calls(lambda x: mx.zeros_like(x), lambda x: x)
    calls.run(odd, size=None)
    assert calls.asked == [("kernel", 256)] and not proving._left_out


def refuses(*, after: int):
    """A kernel that some variant of, or of which the first, is not compiled."""
    asked = []

    def kernel(x):
        asked.append(x)
        if len(asked) > after:
            raise KernelRefusedError("a_kernel", "x.metal:3:7: error: no 'y'")
        return x * 2

    return kernel


@pytest.mark.parametrize("after", [0, 1])
def test_one_that_is_not_compiled_is_left_out_with_the_compilers_words(after):
    left_out(Calls(refuses(after=after)), "x.metal:3:7: error: no 'y'.")


def test_another_variant_that_is_not_compiled_leaves_it_out_later():
    calls = Calls(refuses(after=2))
    calls.run()
    left_out(calls, "x.metal:3:7")


def test_without_memory_for_the_trial_the_kernel_is_used():
    def none_left(x):
        raise RuntimeError("[metal::malloc] Attempting to allocate 9 bytes")

    assert mx.array_equal(Calls(lambda x: x * 2, none_left).run(), KEYS * 2)
    assert not proving._left_out


def test_in_a_traced_function_it_is_used_untried():
    calls = Calls(lambda x: x * 2)
    out = mx.compile(lambda x: calls.run(x) + 1)(KEYS)
    np.testing.assert_array_equal(np.array(out), np.array(KEYS) * 2 + 1)
    assert calls.asked == [("kernel", 256)] and not proving._tried
