"""Memory traffic and collectives of a compiled program, read from its HLO text.

XLA's `cost_analysis` counts the body of a loop once, however often it runs. This module
follows the calls between computations and multiplies by the trip counts of loops.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    "collective-permute",
)
_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip

# Instructions without traffic of their own. What a loop, a call or a branch does counts
# where its computation is walked.
_FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while",
    "conditional", "call", "after-all", "opt-barrier", "iota", "partition-id",
    "get-dimension-size",
}  # fmt: skip

# `f32[2,3]{1,0}`: data type, dimensions, layout.
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, attribute: str) -> str:
        """Returns the computation in an attribute such as `body`; "" if not there."""
        return self.find(rf"\b{attribute}=%?([\w.\-]+)")

    def branches(self) -> list[str]:
        """Returns the computations of a conditional."""
        branches = self.find(r"branch_computations=\{([^}]*)\}")
        if branches:
            return [name.strip().lstrip("%") for name in branches.split(",")]
        return [self.called(f"{value}_computation") for value in ("true", "false")]

    @property
    def path(self) -> str:
        """Name scopes of the instruction in the source program."""
        return self.find(r'op_name="([^"]*)"')

    def find(self, pattern: str) -> str:
        """Returns the group of a pattern in the attributes; "" if not there."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of one device's program."""

    kind: str  # one of `COLLECTIVES`
    num_bytes: int  # size of its result, or of the operands of a reduce-scatter
    times: int  # number of runs per step
    loops: tuple[str, ...]  # paths of the loops around it, outermost first


class Program:
    """The program of one device, from `compiled.as_text()`."""

    def __init__(self, text: str):
        self._computations: dict[str, Computation] = {}
        self._entry = ""
        current: Computation = {}
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                current = self._computations[head[2]] = {}
                self._entry = head[2] if head[1] else self._entry
            elif instruction := _parse(line):
                current[instruction.name] = instruction

    def collectives(self) -> list[Collective]:
        """Returns every collective."""
        collectives: dict[str | int, Collective] = {}
        for instruction, computation, times, loops in self._walk(fusions=True):
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            num_bytes = shape_bytes(instruction.shape)
            if kind == "reduce-scatter" or instruction.opcode == "all-gather-start":
                operands = sum(
                    shape_bytes(computation[n].shape) for n in instruction.operands
                )
                # The result of an all-gather-start includes its operands.
                num_bytes = num_bytes - operands if kind == "all-gather" else operands
            collective = Collective(kind, num_bytes, times, loops)
            # XLA may cut one collective into a chain of pieces, some of them in a loop,
            # to overlap it with compute. The chain counts as its first piece.
            key = instruction.find(r'chain_id="(\d+)"') or len(collectives)
            if key not in collectives or times < collectives[key].times:
                collectives[key] = collective
        return list(collectives.values())

    def memory_bytes(self) -> float:
        """Returns the bytes read from and written to main memory."""
        total = 0
        for instruction, computation, times, _ in self._walk(fusions=False):
            # An asynchronous instruction counts where it starts.
            is_end = instruction.opcode.endswith(("-done", "-update"))
            if instruction.opcode not in _FREE and not is_end:
                total += times * self._traffic(instruction, computation)
        return float(total)

    def _walk(
        self,
        name: str = "",
        *,
        fusions: bool,
        times: int = 1,
        loops: tuple[str, ...] = (),
    ) -> Iterator[tuple[Instruction, Computation, int, tuple[str, ...]]]:
        """Yields each instruction, its computation, its runs per step and its loops."""
        computation = self._computations[name or self._entry]
        for instruction in computation.values():
            yield instruction, computation, times, loops
            attributes: tuple[str, ...] = ()
            inner_times, inner_loops = times, loops
            if instruction.opcode == "while":
                attributes = ("body",)
                inner_times = times * self._trips(instruction)
                inner_loops = (*loops, instruction.path)
            elif fusions:
                attributes = ("calls", "called_computations=\\{", "to_apply")
            elif instruction.opcode == "call":
                attributes = ("to_apply",)
            inner = [*map(instruction.called, attributes)]
            if instruction.opcode == "conditional":
                # Which branch runs is unknown: all count, which is an upper bound.
                inner += instruction.branches()
            for called in inner:
                if called in self._computations:
                    yield from self._walk(
                        called, fusions=fusions, times=inner_times, loops=inner_loops
                    )

    def _traffic(self, instruction: Instruction, computation: Computation) -> int:
        """Returns the bytes that one run of an instruction moves."""
        shapes = [
            computation[n].shape for n in instruction.operands if n in computation
        ]
        if instruction.opcode in ("slice-start", "dynamic-slice-start"):
            # The shape is (operands, result, context); only a slice is read.
            parts = [match[0] for match in _SHAPE.finditer(instruction.shape)]
            result = parts[len(instruction.operands)]
            read = shape_bytes(result) if shape_bytes(shapes[0], in_main=True) else 0
            return read + shape_bytes(result, in_main=True)
        if instruction.opcode == "copy-start":
            # The shape lists result, operand and context: the bytes written and read.
            return shape_bytes(instruction.shape, in_main=True)
        if instruction.opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * shape_bytes(instruction.shape, in_main=True)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * shape_bytes(shapes[1], in_main=True)
        inner = self._computations.get(instruction.called("calls"))
        if inner is None:
            return sum(
                shape_bytes(s, in_main=True) for s in (*shapes, instruction.shape)
            )
        # A fusion that slices an operand, or updates it in place, moves only that part.
        written = shape_bytes(instruction.shape, in_main=True)
        for root in inner.values():
            if root.is_root and root.opcode == "dynamic-update-slice":
                written = min(written, shape_bytes(inner[root.operands[1]].shape))
        return written + sum(
            min(self._read(parameter.name, inner), shape_bytes(shape, in_main=True))
            for parameter, shape in zip(_parameters(inner), shapes, strict=False)
        )

    def _read(self, name: str, inner: Computation) -> int:
        """Returns the bytes that a fused computation reads of one of its arrays.

        The slice of one layer's matrix is often in a nested fusion.
        """
        num_bytes = shape_bytes(inner[name].shape)
        total = num_bytes if inner[name].is_root else 0
        for user in inner.values():
            nested = self._computations.get(user.called("calls"))
            for position, operand in enumerate(user.operands):
                if operand != name:
                    continue
                if user.opcode in ("dynamic-slice", "slice", "gather"):
                    total += shape_bytes(user.shape)
                elif user.opcode == "bitcast":
                    total += self._read(user.name, inner)
                elif nested is not None:
                    total += self._read(_parameters(nested)[position].name, nested)
                elif user.opcode != "dynamic-update-slice" or position > 0:
                    total += num_bytes
        return min(total, num_bytes)

    def _trips(self, loop: Instruction) -> int:
        """Returns how often a loop runs: its condition compares with a constant."""
        if known := loop.find(r"known_trip_count\W+n\W+(\d+)"):
            return int(known)
        pending = [loop.called("condition")]
        numbers = [1]
        while pending:
            for instruction in self._computations.get(pending.pop(), {}).values():
                pending.append(instruction.called("calls"))
                value = instruction.operands[0]
                if instruction.opcode == "constant" and value.isdecimal():
                    numbers.append(int(value))
        return max(numbers)


def shape_bytes(shape: str, *, in_main: bool = False) -> int:
    """Returns the bytes of a shape such as `f32[2,3]{1,0}`, or of a tuple of shapes.

    `in_main` leaves out arrays in other memories than the main one.
    """
    total = 0
    for dtype, dims, layout in _SHAPE.findall(shape):
        # `S(n)` in the layout is the memory space; 0 is the main memory.
        if not (in_main and re.search(r"S\([1-9]", layout)):
            sizes = [int(size) for size in dims.split(",") if size]
            total += math.prod(sizes) * _BYTES.get(dtype, 0)
    return total


def _parse(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    tail = line[head.end() :]
    # The shape of a tuple has spaces and brackets.
    end = _closing(tail) + 1 if tail.startswith("(") else tail.find(" ")
    shape, tail = tail[:end], tail[end:].lstrip()
    opcode, bracket, tail = tail.partition("(")
    if not bracket:
        return None
    end = _closing("(" + tail) - 1
    operands = tuple(re.findall(r"%([\w.\-]+)", tail[:end])) or (tail[:end].strip(),)
    return Instruction(head[2], shape, opcode, operands, tail[end:], bool(head[1]))


def _parameters(computation: Computation) -> list[Instruction]:
    """Returns the parameters of a computation, in order."""
    parameters = (each for each in computation.values() if each.opcode == "parameter")
    return sorted(parameters, key=lambda each: int(each.operands[0]))


def _closing(text: str) -> int:
    """Returns the position of the bracket that closes the first one."""
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return position
    return len(text)
