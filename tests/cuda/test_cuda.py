"""The kernels compile as CUDA, and the decode kernel for coded keys has few instructions."""

from __future__ import annotations

import pytest

from .__main__ import LANE_ROWS, ROWS, codes_decode, deltas_decode
from .count import Trips, Walk, count
from .launches import every_kernel
from .nvcc import DISASSEMBLER_HINT, NVCC_HINT, compile_cuda, find_disassembler, find_nvcc
from .translate import cuda_source

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason=NVCC_HINT)
needs_disassembler = pytest.mark.skipif(find_disassembler() is None, reason=DISASSEMBLER_HINT)
KERNELS = [
    *("delta_hold", "delta_runs", "codes_encode", "deltas_encode"),
    *("codes_decode", "codes_combine", "deltas_decode"),
    *("tile_pack", "tile_score", "tile_attention"),
    "ternary_matvec",
]


@needs_nvcc
@needs_disassembler
def test_instructions_for_a_token():
    """Keys and values of 4 bits, D = 128, four queries."""
    source, walk = codes_decode(*ROWS[0], True)
    compiled = compile_cuda(source, read_back=True)
    kinds = count(compiled.disassembly, source, walk)
    assert kinds["multiply-add"] >= 32  # the products themselves
    assert kinds["all"] <= 58
    assert not compiled.spilled


@needs_nvcc
@needs_disassembler
@pytest.mark.parametrize(("widths", "most"), [(LANE_ROWS[0][0], 76), (LANE_ROWS[1][0], 79)])
def test_instructions_for_a_held_token(request: pytest.FixtureRequest, widths, most):
    """The same for held keys, of lanes up to 4 bits and wider ones."""
    if not request.config.getoption("--all"):
        pytest.skip("compiling and reading it back takes 6 s; --all does")
    source, walk = deltas_decode(widths, 4)
    compiled = compile_cuda(source, read_back=True)
    kinds = count(compiled.disassembly, source, walk)
    assert kinds["multiply-add"] >= 32
    assert kinds["all"] <= most
    assert not compiled.spilled


@needs_nvcc
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(request: pytest.FixtureRequest, name):
    if not request.config.getoption("--all"):
        pytest.skip("compiling every kernel takes 20 s; --all does")
    assert not compile_cuda(cuda_source(every_kernel()[name], "kernel")).spilled


def test_every_kernel_is_translated():
    found = every_kernel()
    assert set(found) == set(KERNELS)
    for generated in found.values():
        assert "__global__ void kernel(" in cuda_source(generated, "kernel")


LISTING = """
	.section	.text.kernel,"ax"
.L_x_0:
	//## File "/t/kernel.cu", line 1
        /*0000*/                   LDG.E R1, [R2] ;
.L_x_1:
	//## File "/t/kernel.cu", line 3 inlined at "/t/kernel.cu", line 2
	//## File "/t/kernel.cu", line 2
        /*0010*/                   FFMA R3, R1, R1, R3 ;
        /*0020*/                   FFMA R4, R1, R1, R4 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
	//## File "/t/kernel.cu", line 4
        /*0040*/                   MUFU.EX2 R3, R3 ;
	//## File "/t/kernel.cu", line 1
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""
SOURCE = "for (blocks)\nscores(x)\nfor (rows)\nrescale()"


def test_counting():
    walk = Walk(4, "for (blocks)", [Trips("scores(", "FFMA", 16)], ["rescale"])
    kinds = count(LISTING, SOURCE, walk)
    # 8 rounds of two multiply-adds and a branch, a load and a branch; for 4 tokens.
    assert kinds == {"multiply-add": 4.0, "other": 2.25, "device": 0.25, "special": 0, "all": 6.5}


@pytest.mark.parametrize(
    ("trips", "message"),
    [([], "there is a loop that ends at"), ([Trips("values(", "FFMA", 1)], "there is a loop")],
)
def test_loops_that_are_not_known(trips, message):
    with pytest.raises(ValueError, match=message):
        count(LISTING, SOURCE, Walk(4, "for (blocks)", trips))
