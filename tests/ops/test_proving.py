"""Kernels that a machine gets wrong, or does not compile, are left out; the others are used."""

from __future__ import annotations

import warnings

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.ops import proving
from mlx_delta.ops.launched import KernelRefusedError
from mlx_delta.ops.proving import itself, proven, tokens_like

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

    def run(self, x=KEYS, form=("a_kernel",)):
        def asked(who, give):
            def call(x):
                self.asked.append((who, x.shape[-2]))
                return give(x)

            return call

        pair = asked("kernel", self._kernel), asked("operations", self._operations)
        return proven(form, x, *pair, self._numbers, lambda: tokens_like(x, 2, SIZE))


def left_out(calls: Calls, message: str) -> None:
    """It is left out with these words, once, and the operations do its work."""
    with pytest.warns(UserWarning, match=rf"\[kernels\] a_kernel is left out .*: {message}"):
        found = calls.run()
    del calls.asked[:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = calls.run()
    assert calls.asked == [("operations", 256)]
    assert mx.array_equal(found, KEYS * 2) and mx.array_equal(again, KEYS * 2)


def test_a_right_kernel_is_tried_once_on_an_input_made_up():
    calls = Calls(lambda x: x * 2.01)
    for _ in range(2):
        assert mx.array_equal(calls.run(), KEYS * 2.01)
    assert calls.asked == [("kernel", 128), ("operations", 128), ("kernel", 256), ("kernel", 256)]


@pytest.mark.parametrize("factor", [0.0, 1.8, 2.2, float("nan"), float("inf")])
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


def test_one_that_is_wrong_in_one_row_is_left_out():
    left_out(Calls(lambda x: mx.concatenate([x[:1] * 2, x[1:]])), "its numbers")


def test_a_last_bit_may_decide_a_few_numbers_otherwise():
    def kernel(x):
        found = np.array(x * 2)
        found[..., 7, 3] *= 1.3
        return mx.array(found)

    Calls(kernel).run()
    assert not proving._left_out


def test_all_numbers_are_compared():
    two = Calls(lambda x: [x, x[..., 0] * 0], lambda x: [x, x[..., 0]], lambda found: found)
    with pytest.warns(UserWarning, match="its numbers are others"):
        two.run()


def test_each_form_is_tried():
    calls = Calls(lambda x: x * 2)
    calls.run()
    for form in (("b",), ("a_kernel", 64), ("a_kernel", mx.float16)):
        del calls.asked[:]
        calls.run(form=form)
        assert len(calls.asked) == 3
        calls.run(form=form)
        assert len(calls.asked) == 4


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 0.0, 65504.0])
def test_what_it_is_used_for_says_nothing_of_a_kernel(odd):
    calls = Calls(lambda x: x * 2, lambda x: mx.where(x == odd, 7, x * 2))
    calls.run(mx.full(KEYS.shape, odd))
    assert calls.asked[-1] == ("kernel", 256) and not proving._left_out


def refuses(*, after: int):
    """A kernel that is not compiled in some of its variants: launches after so many."""
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


def test_without_memory_nothing_is_said_of_it():
    def none_left(x):
        raise RuntimeError("[metal::malloc] Attempting to allocate 9 bytes")

    with pytest.raises(RuntimeError, match="allocate"):
        Calls(none_left).run()
    assert not proving._left_out and not proving._tried


def test_in_a_traced_function_it_is_tried_too():
    calls = Calls(lambda x: x * 2)
    out = mx.compile(lambda x: calls.run(x) + 1)(KEYS)
    np.testing.assert_array_equal(np.array(out), np.array(KEYS) * 2 + 1)
    assert [who for who, _ in calls.asked] == ["kernel", "operations", "kernel"]


def test_tokens_made_up_are_like_others_and_like_their_neighbours():
    made = tokens_like(KEYS[:1, :2].astype(mx.bfloat16), 3, SIZE)
    assert made.shape == (2, 2, 3 * SIZE, 32) and made.dtype == mx.bfloat16
    numbers = np.array(made.astype(mx.float32))
    assert abs(numbers.std() - 1) < 0.1
    assert np.corrcoef(numbers[:, :, 1:].ravel(), numbers[:, :, :-1].ravel())[0, 1] > 0.8
