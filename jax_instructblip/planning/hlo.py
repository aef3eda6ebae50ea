"""The bytes that a compiled program moves between devices, and its estimated time.

Both are read from the program's text, computation by computation. An instruction in the body of a
loop counts as often as the loop runs, which is read from the loop's condition: XLA's own totals
count it once.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

WIDTHS = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
}

# The bytes that each of n devices receives in a collective whose result has b bytes.
RECEIVED = {
    "all-gather": lambda b, n: b * (n - 1) / n,
    "all-reduce": lambda b, n: 2 * b * (n - 1) / n,  # reduced in parts, then gathered
    "reduce-scatter": lambda b, n: b * (n - 1),
    "all-to-all": lambda b, n: b * (n - 1) / n,
    "collective-permute": lambda b, n: b,
}

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_KIND = re.compile(r"(?:^|[\s)}\]])([a-z][\w\-]*)\(")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Line:
    """One instruction of the program's text: `name = shape kind(operands), rest`.

    `text` is all after the equals sign; `root` is True if it makes its computation's result.
    """

    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    text: str
    root: bool


Lines = Mapping[str, Line]  # the instructions of a computation by name
Computations = Mapping[str, Lines]


@dataclasses.dataclass(frozen=True)
class Collective:
    """An instruction that moves data between devices, and how much it moves each time it runs.

    Attributes:
      kind: its operation, such as "all-reduce".
      shape: dtype and sizes of its result, as the text has them.
      received: the bytes that each device receives.
      group: the number of devices that take part.
      times: how often it runs in a step.
      where: the name of the JAX operation that it belongs to, or "".
    """

    kind: str
    shape: str
    received: float
    group: int
    times: int
    where: str


@dataclasses.dataclass(frozen=True)
class Program:
    """Traffic between devices and estimated time of a program, as read from its text.

    Attributes:
      collectives: the instructions that move data between devices.
      cycles: the compiler's estimate of a step's cycles; None if the text has none.
      unknown: names of loops whose number of runs is not in the text.
    """

    collectives: tuple[Collective, ...]
    cycles: int | None
    unknown: tuple[str, ...]

    def moved(self) -> dict[str, dict[str, float]]:
        """Totals per step by kind of collective: `count`, and `bytes` that a device receives."""
        totals: dict[str, dict[str, float]] = {}
        for each in self.collectives:
            row = totals.setdefault(each.kind, {"count": 0, "bytes": 0.0})
            row["count"] += each.times
            row["bytes"] += each.received * each.times
        return totals


def read_program(text: str, devices: int, loops: int = 1) -> Program:
    """Reads the collectives and estimated cycles in `compiled.as_text()`, a program's text.

    The program is for `devices` devices. A loop whose number of runs is not in the text is assumed
    to run `loops` times.
    """
    computations, entry = read_computations(text)
    collectives: list[Collective] = []
    pieces: dict[str, Collective] = {}
    unknown, cycles = [], []
    for step in walk(computations, entry, 1, unknown, loops):
        line, times, fused = step.line, step.times, step.fused
        if not fused and (match := _CYCLES.search(line.text)):
            cycles.append(int(match[1]) * times)
        if collective := _collective(line, times, devices):
            channel = re.search(r"channel_id=(\d+)", line.text)
            if fused and channel:
                # Pieces of one collective, fused with products; a piece may be in a loop.
                known = pieces.get(channel[1], collective)
                pieces[channel[1]] = min(known, collective, key=lambda each: each.times)
            else:
                collectives.append(collective)
    total = sum(cycles) if cycles else None
    return Program((*collectives, *pieces.values()), total, tuple(unknown))


def read_computations(text: str) -> tuple[Computations, str]:
    """Every computation's instructions by name, and the name of the entry computation."""
    computations: dict[str, dict[str, Line]] = {}
    entry, lines = "", {}
    for raw in text.splitlines():
        if head := _HEAD.match(raw):
            lines = computations.setdefault(head[1], {})
            if raw.startswith("ENTRY "):
                entry = head[1]
        elif match := _LINE.match(raw):
            name, rest = match.groups()
            if kind := _KIND.search(rest):
                inside = rest[kind.end() :]
                operands = tuple(re.findall(r"%([\w.\-]+)", inside[: _closing(inside)]))
                root = raw.lstrip().startswith("ROOT ")
                lines[name] = Line(name, rest[: kind.start(1)], kind[1], operands, rest, root)
    return computations, entry


def _closing(text: str) -> int:
    """The index in `text` of the bracket that closes one opened just before `text`."""
    depth = 1
    for index, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if depth == 0:
            return index
    return len(text)


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction that runs `times` times.

    `computation` is the name of the computation that holds it; `fused` is True if it is part of a
    fusion.
    """

    line: Line
    computation: str
    times: int
    fused: bool


def walk(
    computations: Computations,
    name: str,
    times: int,
    unknown: list[str],
    loops: int,
    fused: bool = False,
) -> Iterator[Step]:
    """Yields each instruction that runs in the computation `name` and those that it calls.

    The computation itself runs `times` times, as a part of a fusion if `fused`. Names of loops
    whose number of runs is not in the text are added to `unknown`; they count `loops` times.
    """
    for line in computations.get(name, {}).values():
        yield Step(line, name, times, fused)
        inner, inside = times, fused or line.kind == "fusion"
        if line.kind == "while":
            trips = trips_of(computations, computations[name], line)
            if trips is None:
                unknown.append(line.name)
            inner = times * (loops if trips is None else trips)
        elif line.kind not in ("call", "conditional", "fusion", "async-start"):
            continue  # the function that a reduction applies does not count
        for each in called(line):
            yield from walk(computations, each, inner, unknown, loops, inside)


def called(line: Line) -> list[str]:
    """The names of the computations that an instruction calls."""
    names = _CALLS.findall(line.text)
    for branches in _BRANCHES.findall(line.text):
        names += re.findall(r"[\w.\-]+", branches)
    return names


def trips_of(computations: Computations, outer: Lines, loop: Line) -> int | None:
    """The number of runs of a loop that counts up to a constant; None for other loops.

    `outer` are the instructions of the computation that has the instruction `loop`.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
        return int(known[1])
    parts = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", loop.text))
    condition, body = computations[parts["condition"]], computations[parts["body"]]
    root = next((line for line in condition.values() if line.root), None)
    if root is None or root.kind != "compare" or "direction=LT" not in root.text:
        return None
    counter, limit = (condition[name] for name in root.operands)
    position = tuple_index(counter)
    end = _constant(limit, condition)
    if end is None and (index := tuple_index(limit)) is not None:
        end = _carried(index, outer, loop)
    if position is None or end is None:
        return None
    first, step = _carried(position, outer, loop), _step(position, body)
    if first is None or not step:
        return None
    return max(0, math.ceil((end - first) / step))


def tuple_index(line: Line) -> int | None:
    """The index of the element that the instruction reads from a loop's carried tuple, or None."""
    match = re.search(r"index=(\d+)", line.text) if line.kind == "get-tuple-element" else None
    return int(match[1]) if match else None


def _constant(line: Line, lines: Lines) -> int | None:
    while line.kind in ("copy", "bitcast", "convert") and line.operands[0] in lines:
        line = lines[line.operands[0]]
    match = re.search(r"constant\((-?\d+)\)", line.text) if line.kind == "constant" else None
    return int(match[1]) if match else None


def _carried(index: int, outer: Lines, loop: Line) -> int | None:
    """The initial value of element `index` of a loop's carry; None if not constant."""
    start = outer.get(loop.operands[0])
    if start is None or start.kind != "tuple":
        return None
    line = outer.get(start.operands[index])
    return None if line is None else _constant(line, outer)


def _step(index: int, body: Lines) -> int | None:
    """The amount that a loop's body adds to element `index` of its carry; None if unknown."""
    root = next((line for line in body.values() if line.root), None)
    if root is None or root.kind != "tuple":
        return None
    line = body.get(root.operands[index])
    while line is not None and line.kind in ("copy", "bitcast"):
        line = body.get(line.operands[0])
    if line is None or line.kind not in ("add", "fusion"):
        return None
    if line.kind == "fusion":  # a fused addition: every loop counter of this package steps by 1
        return 1
    steps = [_constant(body[name], body) for name in line.operands if name in body]
    return next((step for step in steps if step is not None), None)


def _collective(line: Line, times: int, devices: int) -> Collective | None:
    kind = line.kind.removesuffix("-start")
    if kind not in RECEIVED:
        return None
    shapes = [shape_bytes(*shape) for shape in SHAPE.findall(line.shape)]
    if line.kind in ("all-gather-start", "collective-permute-start"):
        # The shape lists operands, then results, then buffers of the hardware.
        count = len(line.operands)
        shapes = shapes[count : 2 * count]
    group = _group(line.text, devices)
    where = re.search(r'op_name="([^"]*)"', line.text)
    received = RECEIVED[kind](sum(shapes), group) if group > 1 else 0.0
    return Collective(kind, line.shape.strip(), received, group, times, where[1] if where else "")


def shape_bytes(dtype: str, sizes: str) -> int:
    """The bytes of an array of that dtype, such as "bf16", and of those sizes, such as "2,8"."""
    return WIDTHS.get(dtype, 4) * math.prod(int(size) for size in sizes.split(",") if size)


def _group(text: str, devices: int) -> int:
    """The number of devices among which a collective moves data, from any of three notations.

        {{0,1},{2,3}}    [2,4]<=[8]    mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}

    Raises:
        ValueError: the text has yet another notation.
    """
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", match[2]))
    if "source_target_pairs=" in text:
        return 2
    if re.search(r"replica_groups=\{\}", text) or "replica_groups=" not in text:
        return devices
    raise ValueError(f"cannot read among which devices this moves: {text[:500]}")
