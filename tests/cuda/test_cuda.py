"""The kernels compile as CUDA, and the decode kernel for coded keys has few instructions."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

import mlx_delta

from ..kernels.common import BUILDERS, source_of
from .__main__ import LANE_ROWS, ROWS, codes_decode, deltas_decode
from .count import Trips, Walk, count
from .generated import Generated
from .launches import every_kernel
from .nvcc import DISASSEMBLER_HINT, NVCC_HINT, compile_cuda, find_disassembler, find_nvcc, ptx_of
from .nvrtc import NVRTC_HINT, compile_as_mlx_does, find_nvrtc

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason=NVCC_HINT)
needs_disassembler = pytest.mark.skipif(find_disassembler() is None, reason=DISASSEMBLER_HINT)
KERNELS = [
    *(
        "delta_hold",
        "token_sequence",
        "delta_runs",
        "codes_encode",
        "deltas_encode",
        "values_encode",
    ),
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


@pytest.fixture(scope="module")
def texts() -> dict[str, Generated]:
    return every_kernel()


@needs_nvcc
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(request: pytest.FixtureRequest, texts, name):
    if not request.config.getoption("--all"):
        pytest.skip("compiling every kernel takes 30 s; --all does")
    assert not compile_cuda(texts[name].text).spilled


@pytest.mark.skipif(find_nvrtc() is None, reason=NVRTC_HINT)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_as_mlx_does_it(request: pytest.FixtureRequest, texts, name):
    if not request.config.getoption("--all") and name != KERNELS[-1]:
        pytest.skip("compiling every kernel takes 40 s; --all does")
    compile_as_mlx_does(texts[name])


def test_every_kernel_is_translated(texts):
    assert set(texts) == set(KERNELS)


def test_every_builder_is_known_to_the_tests():
    """What the tests forget and capture are all of the functions that make kernels."""
    files = Path(mlx_delta.__file__).parent.joinpath("ops").glob("*.py")
    found = [re.findall(r"@cache\ndef (\w+_kernel)\(", file.read_text()) for file in files]
    assert set(sum(found, [])) == {*BUILDERS, "matvec_kernel"}
    assert {source_of(builder).name for builder in BUILDERS} == {*KERNELS} - {"ternary_matvec"}


def unsure_sums(ptx: str) -> list[str]:
    """Where a product and a sum are, or may become, one operation; and what is not exact at all.

    A product with a power of two is exact, and may become part of a sum.
    """
    lines = [line.strip() for line in ptx.splitlines() if not line.strip().startswith("//")]
    unsure = re.compile(r"(fma\.rn|mul|mad)(\.ftz)?\.f32|\.approx|\.ftz")
    exact = re.compile(r"mul\.f32\s.*, 0f[0-9A-F]{2}[08]00000;")
    return [line for line in lines if unsure.search(line) and not exact.match(line)]


DECIDING = sorted(source_of(name).name for name in BUILDERS if source_of(name).compile_options)


@needs_nvcc
@pytest.mark.parametrize("name", DECIDING)
def test_what_asks_for_safe_math_rounds_every_operation(
    request: pytest.FixtureRequest, texts, name
):
    """NVIDIA's compiler gets no options from MLX, so that the source sees to it.

    But for powers of e, which say how much a token counts: they are as exact as `expf` is.
    """
    if name != "delta_runs" and not request.config.getoption("--all"):
        pytest.skip("one of them is enough; --all compiles all")
    found = unsure_sums(ptx_of(texts[name].text))
    powers = sum(line.startswith("ex2.") for line in found)
    one = unsure_sums(ptx_of(POWER)) if powers else []
    assert Counter(map(opcode, found)) == Counter(map(opcode, one * powers))


POWER = """
#include <math.h>
extern "C" __global__ void power(float* x) { x[threadIdx.x] = expf(x[threadIdx.x]); }
"""


def opcode(line: str) -> str:
    """The operation of a line of PTX."""
    return line.split()[0]


def test_sums_that_are_not_sure():
    fused, exact = "fma.rn.f32 %f1, %f2, %f3;", "mul.rn.f32 %f1, %f2, %f3;"
    halved, product = "mul.f32 %f1, %f2, 0f3F000000;", "mul.f32 %f1, %f2, 0f3F000001;"
    root = "sqrt.approx.f32 %f1, %f2;"
    assert unsure_sums("\n".join([exact, fused, halved, product, root])) == [fused, product, root]


def test_what_compares_with_thresholds_asks_for_safe_math():
    assert {"delta_runs"} <= set(DECIDING)
    for name in BUILDERS:
        assert source_of(name).compile_options in (None, {"math_mode": "safe"})


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
