"""What a machine does not compile is known at a kernel's first launch, by name."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_delta.ops.launched import KernelRefusedError, Launched

X = mx.arange(8)


class Failing:
    """A result that MLX can't compute."""

    def __init__(self, error):
        self.error = error


@pytest.fixture
def waits(monkeypatch):
    """How often anything was computed; computing a failing result fails."""
    real, seen = mx.eval, []

    def evaluated(*results):
        seen.append(results)
        for result in results:
            for one in result if isinstance(result, list) else [result]:
                if isinstance(one, Failing):
                    raise one.error
        return real(*(x for x in results if not isinstance(x, Failing)))

    monkeypatch.setattr(mx, "eval", evaluated)
    return seen


def doubling(inputs, template, **call):
    return [inputs[0] * 2]


def test_the_first_launch_of_each_variant_is_waited_for(waits):
    kernel = Launched("k", doubling)
    for dim, wanted in ((64, 2), (64, 0), (128, 2), (64, 0)):
        del waits[:]
        (out,) = kernel(inputs=[X, 3], template=[("D", dim)], grid=(1, 1, 1))
        assert len(waits) == wanted, "for the inputs, and for the outputs"
        assert mx.array_equal(out, X * 2)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_what_is_not_compiled_is_said_in_the_compilers_words(waits, kind):
    said = "[metal::Device] Unable to build metal library from source\n\nx.metal:3:7: error: no 'y'"
    kernel = Launched("k", lambda **_: [Failing(kind(said))])
    for _ in range(2):
        with pytest.raises(KernelRefusedError, match=r"^\[k\] does not run here: x.metal:3:7: e"):
            kernel(inputs=[X])


def test_what_the_launch_itself_refuses_is_so_too():
    def launch(**_):
        raise ValueError("Thread group size (1024) is greater than the maximum (832).")

    with pytest.raises(KernelRefusedError, match=r"\(832\)\.$"):
        Launched("k", launch)(inputs=[X])


@pytest.mark.parametrize("said", ["Attempting to allocate 9 bytes", "Insufficient Memory (0x8)"])
def test_no_memory_is_no_fault_of_a_kernel(waits, said):
    kernel = Launched("k", lambda **_: [Failing(RuntimeError(said))])
    with pytest.raises(RuntimeError, match="emory|allocate") as caught:
        kernel(inputs=[X])
    assert not isinstance(caught.value, KernelRefusedError)


def test_too_much_memory_of_a_threadgroup_is_one(waits):
    said = "Threadgroup memory size (33024) exceeds the maximum threadgroup memory allowed (32768)"
    with pytest.raises(KernelRefusedError, match="33024"):
        Launched("k", lambda **_: [Failing(RuntimeError(said))])(inputs=[X])


def test_in_a_traced_function_nothing_is_waited_for():
    kernel = Launched("k", doubling)
    out = mx.compile(lambda x: kernel(inputs=[x])[0] + 1)(X)
    assert mx.array_equal(out, X * 2 + 1) and not kernel._compiled
