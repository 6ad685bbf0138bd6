"""Instructions of a kernel's steady state, counted from its machine code.

A kernel walks over blocks of tokens in one loop. Of each instruction in that loop the compiler
says which source lines it comes from, from the innermost function outwards. An instruction counts
as often as the loops inside the block's that it stands in are run, and not at all if it comes from
code that a block in the middle of a long text does not reach. Both are told by words of the source.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_SECTION = re.compile(r"\s*\.section\s+\.text\.")
_LABEL = re.compile(r"(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.*?);")
_LINE = re.compile(r'//## File "([^"]*)", line (\d+)')
_BRANCH = re.compile(r"BRA.*`\((\.L_x_\d+)\)")
_KINDS = {
    "multiply-add": {"FFMA"},
    "other float": {"FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "FMNMX"},
    "shuffle": {"SHFL"},
    "threadgroup": {"LDS", "STS"},
    "device": {"LDG", "STG", "LD", "ST"},
    "special": {"MUFU", "POPC", "I2F", "F2I", "F2F"},
}


@dataclass(frozen=True)
class Trips:
    """How often a loop runs for one block.

    Attributes:
        where: Words of a source line that its end comes from.
        operation: An operation of it, and
        total: how many of those one pass of what is around it needs, so that unrolled loops count
            right. Without an operation, how often the loop runs.
        holds: Words of a source line that some of it comes from.
    """

    where: str
    operation: str
    total: float
    holds: str = ""


@dataclass(frozen=True)
class Walk:
    """What a block in the middle of a long text does.

    Attributes:
        tokens: Of a block.
        loop: Words of the source line that the end of the loop over blocks comes from.
        trips: Of the loops in it. Several loops of one kind: the longest runs, the others are what
            the compiler made for remainders.
        cold: Words of source lines whose instructions do not count.
    """

    tokens: int
    loop: str
    trips: Sequence[Trips]
    cold: Sequence[str] = ()


@dataclass(frozen=True)
class Instruction:
    """One instruction: its text, and the source lines that it comes from, innermost first."""

    text: str
    lines: tuple[str, ...]

    @property
    def operation(self) -> str:
        """``FFMA`` and the like, without predicate and modifiers."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0].split(".")[0]

    def comes_from(self, words: str) -> bool:
        """Whether one of its lines has these words."""
        return any(words in line for line in self.lines)


def read(disassembly: str, source: str) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """A kernel's instructions, and its loops as first and last instruction.

    Args:
        disassembly: What nvdisasm prints with line information.
        source: The file that was compiled.
    """
    texts = source.splitlines()
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    lines: list[str] = []
    fresh = inside = False
    for printed in disassembly.splitlines():
        if printed.lstrip().startswith(".section"):
            inside = bool(_SECTION.match(printed))
        if not inside:
            continue
        if (found := _LINE.search(printed)) is not None:
            lines = lines if fresh else []
            own = found[1].endswith("kernel.cu")
            lines.append(texts[int(found[2]) - 1].strip() if own else found[1])
            fresh = True
        elif (found := _LABEL.match(printed.strip())) is not None:
            labels[found[1]] = len(instructions)
        elif (found := _INSTRUCTION.match(printed)) is not None:
            instructions.append(Instruction(found[1], tuple(lines)))
            fresh = False
    ends: dict[int, int] = {}
    for index, instruction in enumerate(instructions):
        branch = _BRANCH.search(instruction.text)
        if branch is not None and labels.get(branch[1], index) < index:
            first = labels[branch[1]]
            ends[first] = max(index, ends.get(first, 0))
    return instructions, sorted(ends.items())


def count(disassembly: str, source: str, walk: Walk) -> Counter[str]:
    """Instructions for a token, by kind, ``all`` among them.

    Raises:
        ValueError: A loop of the walk is not there, or one is there that it does not tell.
    """
    instructions, loops = read(disassembly, source)
    over_blocks = [loop for loop in loops if instructions[loop[1]].comes_from(walk.loop)]
    first, last = max(over_blocks, key=lambda loop: loop[1] - loop[0])
    cold = [any(x.comes_from(words) for words in walk.cold) for x in instructions]
    often = [0.0 if cold[i] else 1.0 for i in range(len(instructions))]
    inner = [(a, b) for a, b in loops if first <= a and b <= last and (a, b) != (first, last)]
    known: dict[Trips, list[tuple[int, int]]] = {trips: [] for trips in walk.trips}
    for a, b in inner:
        if cold[b]:
            often[a : b + 1] = [0.0] * (b + 1 - a)
            continue
        own = [
            trips
            for trips in walk.trips
            if instructions[b].comes_from(trips.where)
            and any(x.comes_from(trips.holds) for x in instructions[a : b + 1])
        ]
        if not own:
            raise ValueError(f"[count] there is a loop that ends at {instructions[b].lines[:3]}.")
        known[own[0]].append((a, b))
    for trips, places in known.items():
        if not places:
            raise ValueError(f"[count] there is no loop at {trips.where!r}.")
        a, b = max(places, key=lambda place: place[1] - place[0])
        for c, d in places:
            if (c, d) != (a, b) and not a <= c <= d <= b:
                often[c : d + 1] = [0.0] * (d + 1 - c)
        in_loop = sum(x.operation == trips.operation for x in instructions[a : b + 1])
        in_loop = in_loop if trips.operation else 1
        for i in range(a, b + 1):
            often[i] *= trips.total / in_loop
    kinds: Counter[str] = Counter()
    for i in range(first, last + 1):
        operation = instructions[i].operation
        kind = next((name for name, group in _KINDS.items() if operation in group), "other")
        kinds[kind] += often[i] / walk.tokens  # type: ignore[assignment]
        kinds["all"] += often[i] / walk.tokens  # type: ignore[assignment]
    return kinds
