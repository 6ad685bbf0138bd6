"""Kernels that a machine refuses, or gets wrong, are left out; the others are used."""

from __future__ import annotations

import warnings

import mlx.core as mx
import numpy as np
import pytest

from mlx_delta.ops import proving
from mlx_delta.ops.proving import itself, proven

X = mx.arange(200).astype(mx.float32)


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    monkeypatch.setattr(proving, "_right", {})


class Calls:
    """A kernel and its operations, each giving an array, and how often they were asked."""

    def __init__(self, kernel, operations=lambda x: x * 2):
        self.asked = []
        self._kernel, self._operations = kernel, operations

    def run(self, x=X, form=("a_kernel",)):
        def kernel():
            self.asked.append("kernel")
            return self._kernel(x)

        def operations():
            self.asked.append("operations")
            return self._operations(x)

        return proven(form, [x], kernel, operations, itself)


class Failing:
    """What MLX can't compute."""

    def __init__(self, error):
        self.error = error


@pytest.fixture
def failing_eval(monkeypatch):
    real = mx.eval

    def evaluated(*results):
        for result in results:
            for one in result if isinstance(result, list) else [result]:
                if isinstance(one, Failing):
                    raise one.error
        return real(*results)

    monkeypatch.setattr(mx, "eval", evaluated)


def test_a_right_kernel_is_tried_once_and_used():
    calls = Calls(lambda x: x * 2 + 1e-3)
    for _ in range(3):
        assert mx.array_equal(calls.run(), X * 2 + 1e-3)
    assert calls.asked == ["kernel", "operations", "kernel", "kernel"]


@pytest.mark.parametrize("change", [1.5, float("nan"), float("inf")])
def test_a_wrong_one_is_left_out_and_said_once(change):
    calls = Calls(lambda x: x * 2 * change)
    with pytest.warns(UserWarning, match=r"\[kernels\] a_kernel is left out .* (9.|100)% of"):
        assert mx.array_equal(calls.run(), X * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mx.array_equal(calls.run(), X * 2)
    assert calls.asked == ["kernel", "operations", "operations"]


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_one_that_is_not_compiled_is_left_out_with_the_compilers_words(failing_eval, kind):
    said = "[metal::Device] Unable to build metal library from source\n\nx.metal:3:7: error: no 'y'"
    calls = Calls(lambda x: Failing(kind(said)))
    with pytest.warns(UserWarning, match=r"do its work: x.metal:3:7: error: no 'y'\."):
        assert mx.array_equal(calls.run(), X * 2)
    assert mx.array_equal(calls.run(), X * 2)
    assert calls.asked == ["kernel", "operations", "operations"]


def test_each_form_is_tried():
    calls = Calls(lambda x: x * 2)
    calls.run(form=("a_kernel", mx.float16, 64))
    calls.run(form=("a_kernel", mx.float16, 128))
    calls.run(form=("a_kernel", mx.float16, 64))
    assert calls.asked == ["kernel", "operations"] * 2 + ["kernel"]


def test_numbers_that_hang_on_a_last_bit_may_be_others():
    def some_others(count):
        return Calls(lambda x: mx.where(mx.arange(200) < count, -x - 50, x * 2))

    calls = some_others(4)
    calls.run()
    assert proving._right == {("a_kernel",): True}
    proving._right.clear()
    with pytest.warns(UserWarning, match="3% of its numbers"):
        some_others(6).run()


def test_a_large_channel_does_not_hide_a_mistake_in_the_others():
    rows = mx.concatenate([mx.random.normal((50, 31)), mx.full((50, 1), 300.0)], axis=1)
    mistaken = mx.where(mx.arange(32) < 4, rows + 1, rows)
    with pytest.warns(UserWarning, match="12% of its numbers"):
        Calls(lambda x: mistaken, lambda x: x).run(rows)


def test_what_is_not_finite_must_be_so_too():
    odd = mx.array([1.0, float("nan"), float("inf")] * 40)
    Calls(lambda x: x, lambda x: x).run(odd)
    assert proving._right == {("a_kernel",): True}
    proving._right.clear()
    with pytest.warns(UserWarning, match="67%"):
        Calls(lambda x: mx.zeros_like(x) + 1, lambda x: x).run(odd)


def test_whole_numbers_must_be_the_same():
    numbers = mx.arange(100)
    with pytest.warns(UserWarning, match="3% of its numbers"):
        Calls(lambda x: mx.where(x < 3, x + 1, x), lambda x: x).run(numbers)


def test_an_empty_result_is_right():
    Calls(lambda x: x[:0], lambda x: x[:0]).run()
    assert proving._right == {("a_kernel",): True}


def test_in_a_traced_function_it_is_used_untried():
    calls = Calls(lambda x: x * 2)
    out = mx.compile(lambda x: calls.run(x) + 1)(X)
    np.testing.assert_array_equal(np.array(out), np.array(X) * 2 + 1)
    assert calls.asked == ["kernel"]
    assert proving._right == {}


def test_what_the_inputs_fail_of_is_not_the_kernels(failing_eval):
    calls = Calls(lambda x: x)
    lost = Failing(RuntimeError("no memory"))
    assert calls.run(lost) is lost
    assert proving._right == {}


def test_without_memory_for_the_operations_the_kernel_is_used(failing_eval):
    lost = Failing(RuntimeError("[metal::malloc] Attempting to allocate 9 bytes"))
    calls = Calls(lambda x: x * 2, lambda x: lost)
    for _ in range(2):
        assert mx.array_equal(calls.run(), X * 2)
    assert calls.asked == ["kernel", "operations", "kernel"]


@pytest.mark.parametrize("said", ["Attempting to allocate 9 bytes", "Insufficient Memory (0x8)"])
def test_no_memory_for_a_kernel_is_no_fault_of_it(failing_eval, said):
    calls = Calls(lambda x: Failing(RuntimeError(f"[metal] {said}")))
    with pytest.raises(RuntimeError, match="etal"):
        calls.run()
    assert proving._right == {}


def test_too_much_memory_of_a_threadgroup_is_one(failing_eval):
    said = "Threadgroup memory size (33024) exceeds the maximum threadgroup memory allowed (32768)"
    with pytest.warns(UserWarning, match="33024"):
        Calls(lambda x: Failing(RuntimeError(said))).run()
    assert proving._right == {("a_kernel",): False}
