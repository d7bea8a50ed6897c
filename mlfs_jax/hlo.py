"""What a compiled program does, counted in its text: FLOPs of matrix products and collectives, loops included.

``compiled.cost_analysis()`` counts the body of a loop once. Here a loop counts as often as it runs, which XLA writes
beside every loop whose length is known; layers under ``lax.scan`` are such loops.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_NAMED = re.compile(r"\s*(?:ROOT )?%([\w.-]+) = (.*)")
_HEADER = re.compile(r"(ENTRY )?%([\w.-]+) \(.*\{$")
_OPCODE = re.compile(r" ([a-z][a-z0-9-]*)\(")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind on one device.

    Attributes:
        count: how many run.
        nbytes: of the arrays they make or consume, whichever is larger: what an all-gather gathers, an all-reduce
            reduces. What goes over a link depends on the algorithm, and is of that order.
    """

    count: int = 0
    nbytes: int = 0

    def __add__(self, other: Collective) -> Collective:
        return Collective(self.count + other.count, self.nbytes + other.nbytes)

    def __mul__(self, times: int) -> Collective:
        return Collective(times * self.count, times * self.nbytes)


@dataclass(frozen=True)
class Cost:
    """What one run of a program costs one device.

    Attributes:
        flops: of matrix products, 2 per multiply-add.
        collectives: by kind; kinds that do not occur are left out.
        unknown_loops: loops whose length XLA does not say; they are counted as if they ran once.
    """

    flops: int = 0
    collectives: Mapping[str, Collective] = field(default_factory=dict)
    unknown_loops: int = 0

    def __add__(self, other: Cost) -> Cost:
        kinds = [kind for kind in COLLECTIVES if kind in self.collectives or kind in other.collectives]
        none = Collective()
        summed = {kind: self.collectives.get(kind, none) + other.collectives.get(kind, none) for kind in kinds}
        return Cost(self.flops + other.flops, summed, self.unknown_loops + other.unknown_loops)

    def __mul__(self, times: int) -> Cost:
        collectives = {kind: found * times for kind, found in self.collectives.items()}
        return Cost(times * self.flops, collectives, self.unknown_loops)

    @property
    def nbytes(self) -> int:
        """Of all collectives."""
        return sum(found.nbytes for found in self.collectives.values())


def cost_of(text: str) -> Cost:
    """The cost of one run of a compiled program, ``compiled.as_text()``, on one device.

    Of the branches of a conditional the costliest counts: a layer that a subnet skips counts as if it ran.
    """
    computations, entry = _split(text)
    known: dict[str, Cost] = {}

    def cost(name: str) -> Cost:
        if name not in known:
            lines = list(_instructions(computations[name]))
            types = {named: type_ for named, type_, _, _ in lines}
            known[name] = sum((one(types, *line[1:]) for line in lines), Cost())
        return known[name]

    def one(types: Mapping[str, str], type_: str, opcode: str, rest: str) -> Cost:
        operands = [types[name] for name in re.findall(r"%([\w.-]+)", rest[: rest.find(")")]) if name in types]
        inner = sum((cost(name) for name in _CALLED.findall(rest)), Cost())
        if opcode == "while":
            trips = _TRIPS.search(rest)
            return inner * int(trips[1]) if trips else inner + Cost(unknown_loops=1)
        if opcode == "conditional":
            named = re.findall(r"%([\w.-]+)", " ".join("".join(groups) for groups in _BRANCHES.findall(rest)))
            return max((cost(name) for name in named), key=lambda branch: (branch.flops, branch.nbytes))
        if opcode == "dot":
            contracted = _dims(operands[0], _CONTRACTED.search(rest)[1])
            return Cost(2 * math.prod(math.prod(shape) for _, shape in _arrays(type_)) * contracted)
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            return Cost(collectives={kind: Collective(1, max(_nbytes(type_), sum(map(_nbytes, operands))))})
        return inner

    return cost(entry)


def _split(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by its name, and the name of the one that is run."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _instructions(lines: list[str]) -> Iterator[tuple[str, str, str, str]]:
    """(name, type, opcode, what follows its bracket) of each line that is an instruction."""
    for line in lines:
        named = _NAMED.match(line)
        opcode = named and _OPCODE.search(" " + named[2])
        if opcode:
            yield named[1], named[2][: max(opcode.start() - 1, 0)], opcode[1], named[2][opcode.end() - 1 :]


def _arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """The dtype and shape of every array in a type, which may be a tuple."""
    return [(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in _ARRAY.findall(type_)]


def _dims(type_: str, axes: str) -> int:
    """Product of some of the sizes of an array."""
    [(_, shape)] = _arrays(type_)
    return math.prod(shape[int(axis)] for axis in axes.split(",") if axis)


def _nbytes(type_: str) -> int:
    bits = {"pred": 8, "token": 0}
    sizes = ((bits.get(kind) if kind in bits else int(re.search(r"\d+", kind)[0]), n) for kind, n in _arrays(type_))
    return sum(size * math.prod(shape) // 8 for size, shape in sizes)
