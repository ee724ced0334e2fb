"""What a compiled program does, read from XLA's text of it.

XLA's own cost analysis counts the body of a loop once, however often it runs. Here the
computations are walked as they are called, loops as many times as their condition
says, and what is found is bytes: of the collectives, and of arrays in main memory.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip

# These name or arrange arrays; they read and write nothing.
_FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while",
    "conditional", "call", "after-all", "opt-barrier", "iota", "partition-id",
    "get-dimension-size",
}  # fmt: skip

# What runs beside other work has its bytes counted where it begins.
_FINISHING = ("-done", "-update")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: what it makes, from what, and the computations it calls."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def called(self, attribute: str) -> str | None:
        """Returns the computation behind an attribute, such as `body`."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    @property
    def path(self) -> str:
        """Where in the source program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of one device's program.

    Attributes:
        kind: One of `COLLECTIVES`.
        num_bytes: Of its result, each time; of a reduce-scatter of what goes in.
        times: How often it runs in a step.
        path: Where in the source program it comes from.
        loops: Paths of the loops it runs in, outermost first.
    """

    kind: str
    num_bytes: int
    times: int
    path: str
    loops: tuple[str, ...]


class Program:
    """A program of one device, `compiled.as_text()`."""

    def __init__(self, text: str):
        """Parses the text."""
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                current = self._computations[head[2]] = {}
                self._entry = head[2] if head[1] else self._entry
            elif instruction := _parse(line):
                current[instruction.name] = instruction

    def collectives(self) -> list[Collective]:
        """Returns every collective, with how often it runs."""
        found: dict[str | int, Collective] = {}
        for chain, one in self._collectives(self._entry, 1, ()):
            # One collective in pieces, so that others may compute beside it, in loops
            # too: it begins outside of them.
            key = chain or len(found)
            if key not in found or one.times < found[key].times:
                found[key] = one
        return list(found.values())

    def _collectives(
        self, computation: str, times: int, loops: tuple[str, ...]
    ) -> Iterator[tuple[str | None, Collective]]:
        instructions = self._computations[computation]
        for one in instructions.values():
            kind = one.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                shapes = [one.shape]
                if kind == "reduce-scatter":
                    shapes = [instructions[name].shape for name in one.operands]
                num_bytes = sum(shape_bytes(shape) for shape in shapes)
                if one.opcode == "all-gather-start":
                    # Its result holds its operand too.
                    num_bytes -= sum(
                        shape_bytes(instructions[name].shape) for name in one.operands
                    )
                chain = re.search(r'chain_id="(\d+)"', one.rest)
                collective = Collective(kind, num_bytes, times, one.path, loops)
                yield chain[1] if chain else None, collective
            elif one.opcode == "while":
                body, inside = one.called("body"), (*loops, one.path)
                assert body is not None
                yield from self._collectives(body, times * self._trips(one), inside)
            else:
                for attribute in ("calls", "called_computations=\\{", "to_apply"):
                    other = one.called(attribute)
                    if other in self._computations:
                        yield from self._collectives(other, times, loops)

    def memory_bytes(self) -> float:
        """Returns the bytes read from and written to main memory."""
        return self._traffic(self._entry)

    @functools.cache  # noqa: B019  (a program lives as long as its report)
    def _traffic(self, computation: str) -> float:
        total = 0.0
        instructions = self._computations[computation]
        for one in instructions.values():
            if one.opcode == "while":
                body = one.called("body")
                assert body is not None
                total += self._trips(one) * self._traffic(body)
            elif one.opcode in ("call", "conditional"):
                other = one.called("to_apply")
                total += self._traffic(other) if other in self._computations else 0.0
            elif one.opcode not in _FREE and not one.opcode.endswith(_FINISHING):
                total += self._traffic_of(one, instructions)
        return total

    def _traffic_of(
        self, one: Instruction, instructions: dict[str, Instruction]
    ) -> float:
        shapes = [instructions[n].shape for n in one.operands if n in instructions]
        if one.opcode in ("slice-start", "dynamic-slice-start"):
            # Its shape is (operands, result, context); of an operand it reads a part.
            (source,), result = shapes[:1], split_tuple(one.shape)[1]
            read = shape_bytes(result) if shape_bytes(source, in_main=True) else 0
            return float(read + shape_bytes(result, in_main=True))
        if one.opcode == "copy-start":
            # Its shape is (result, operand, context).
            return float(shape_bytes(one.shape, in_main=True))
        if one.opcode in ("dynamic-slice", "gather", "slice"):
            return 2.0 * shape_bytes(one.shape, in_main=True)
        if one.opcode == "dynamic-update-slice":
            return 2.0 * shape_bytes(shapes[1], in_main=True)
        inner = self._computations.get(one.called("calls") or "")
        if inner is None:
            everything = (*shapes, one.shape)
            return float(sum(shape_bytes(s, in_main=True) for s in everything))
        # Of an array that a fusion only slices, or updates in place, it touches a part.
        total = self._written(one, inner)
        for parameter, shape in zip(_parameters(inner), shapes, strict=False):
            whole = shape_bytes(shape, in_main=True)
            total += min(self._read(parameter.name, inner), whole)
        return float(total)

    def _read(self, name: str, inner: dict[str, Instruction]) -> int:
        """Returns the bytes that a fused computation reads of one of its arrays.

        The slice of one layer's matrix often lies in a fusion inside of the fusion that
        multiplies by it.
        """
        whole = shape_bytes(inner[name].shape)
        total = whole if inner[name].is_root else 0
        for user in inner.values():
            for position, operand in enumerate(user.operands):
                nested = self._computations.get(user.called("calls") or "")
                if operand != name:
                    continue
                if user.opcode in ("dynamic-slice", "slice", "gather"):
                    total += shape_bytes(user.shape)
                elif user.opcode == "bitcast":
                    total += self._read(user.name, inner)
                elif nested is not None:
                    total += self._read(_parameters(nested)[position].name, nested)
                elif user.opcode != "dynamic-update-slice" or position > 0:
                    total += whole
        return min(total, whole)

    def _written(self, one: Instruction, inner: dict[str, Instruction]) -> int:
        """Returns the bytes that a fusion writes to main memory."""
        written = shape_bytes(one.shape, in_main=True)
        for root in inner.values():
            if root.is_root and root.opcode == "dynamic-update-slice":
                update = inner[root.operands[1]]
                written = min(written, shape_bytes(update.shape))
        return written

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs: its condition compares with a constant."""
        known = re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest)
        if known:
            return int(known[1])
        pending = [loop.called("condition")]
        numbers = [1]
        while pending:
            for one in self._computations.get(pending.pop() or "", {}).values():
                pending.append(one.called("calls"))
                if one.opcode == "constant" and one.operands[0].isdecimal():
                    numbers.append(int(one.operands[0]))
        return max(numbers)


def shape_bytes(shape: str, *, in_main: bool = False) -> int:
    """Returns the bytes of a shape, or of a tuple of them.

    Args:
        shape: As XLA writes it, `f32[2,3]{1,0}`.
        in_main: Leaves out what lies in a memory other than the main one.
    """
    total = 0
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shape):
        if in_main and re.search(r"S\([1-9]", layout):
            continue
        sizes = [int(size) for size in dims.split(",") if size]
        total += math.prod(sizes) * _BYTES.get(dtype, 0)
    return total


def split_tuple(shape: str) -> list[str]:
    """Returns the elements of a tuple's shape."""
    elements, depth = [""], 0
    for letter in shape[1:-1]:
        if letter == "," and depth == 0:
            elements.append("")
        else:
            depth += (letter in "([{") - (letter in ")]}")
            elements[-1] += letter
    return elements


def _parse(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    # A tuple has spaces and brackets inside.
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, bracket, rest = rest.partition("(")
    if not bracket:
        return None
    end = _closing("(" + rest) - 1
    inside = rest[:end]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or (inside.strip(),)
    return Instruction(head[2], shape, opcode, operands, rest[end:], bool(head[1]))


def _parameters(computation: dict[str, Instruction]) -> list[Instruction]:
    """Returns what a computation is given, in the order of its arguments."""
    found = [one for one in computation.values() if one.opcode == "parameter"]
    return sorted(found, key=lambda one: int(one.operands[0]))


def _closing(text: str) -> int:
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return position
    return len(text)
