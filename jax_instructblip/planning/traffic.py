"""The arrays that a compiled program makes, what it copies, and the bytes that its loops read.

All are read from the program's text (`compiled.as_text()`), kernel by kernel. A kernel is an
instruction that runs by itself, such as a fusion, a call of a library or a copy. It reads its
operands, or of an operand that it slices the slice alone, and writes its result.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from jax_instructblip.planning.hlo import (
    SHAPE,
    Line,
    Lines,
    called,
    read_computations,
    shape_bytes,
    trips_of,
    tuple_index,
    walk,
)

# Instructions that touch no memory, or whose body is listed by itself.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"),
    *("call", "conditional", "async-start", "async-update", "opt-barrier", "add-dependency"),
    *("partition-id", "replica-id"),
}
_SLICES = ("dynamic-slice", "slice", "gather")
_SAME = ("bitcast", "reshape", "copy", "opt-barrier", "copy-start", "copy-done")
# Instructions of a fusion that only copies, with the word for what they do; "" says nothing.
_MOVES = {
    **dict.fromkeys(("dynamic-slice", "slice"), "slice"),
    **dict.fromkeys(("transpose", "copy"), "copy"),
    **{"concatenate": "join", "pad": "pad", "convert": "convert"},
    **dict.fromkeys(("parameter", "constant", "bitcast", "reshape", "tuple"), ""),
}
_SCRATCH = re.compile(r"__cublas|__cudnn")  # library calls whose last result is working memory
_ON_CHIP = re.compile(r"\{[^{}]*S\([1-9]\d*\)[^{}]*\}")  # layouts of TPU arrays outside of HBM
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instruction that runs by itself, and the bytes of memory that it touches each time.

    Attributes:
      name: its name in the text.
      kind: its operation in XLA, such as "fusion" or "copy".
      shape: dtype and sizes of its result, as the text has them.
      times: how often it runs in a step.
      made: bytes of its result.
      read: bytes that it reads of its operands.
      written: bytes that it writes; less than `made` if it updates an operand in place.
      copies: words for what it does if it only copies, such as "slice" or "convert, join"; else "".
      source: the program's argument of which it copies, as JAX names it, or "".
      dtypes: dtypes of the largest operand and of the result.
      where: the JAX operation that it belongs to.
    """

    name: str
    kind: str
    shape: str
    times: int
    made: int
    read: int
    written: int
    copies: str
    source: str
    dtypes: tuple[str, str]
    where: str


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of the entry computation, and the kernels that one run of its body starts.

    `trips` is how often it runs, or None if that is not in the text. Kernels of inner loops have
    their `times` within one run of the body.
    """

    name: str
    trips: int | None
    kernels: tuple[Kernel, ...]

    @property
    def read(self) -> int:
        """The bytes that one run of the body reads."""
        return sum(each.read * each.times for each in self.kernels)

    @property
    def written(self) -> int:
        """The bytes that one run of the body writes."""
        return sum(each.written * each.times for each in self.kernels)


def copies(kernels: list[Kernel] | tuple[Kernel, ...]) -> list[Kernel]:
    """Those of `kernels` that only copy, sorted: those that read most in a step come first."""
    return sorted((each for each in kernels if each.copies), key=lambda each: -_total(each))


def _total(kernel: Kernel) -> int:
    return kernel.read * kernel.times


class Traffic:
    """The kernels of a program's text; a loop of unknown length counts as `loops` runs.

    `kernels` is the list of all of them, those in loops included.
    """

    def __init__(self, text: str, loops: int = 1):
        self._computations, self._entry = read_computations(text)
        self._callers = {
            inner: (name, line)
            for name, lines in self._computations.items()
            for line in lines.values()
            for inner in called(line)
        }
        self.kernels = list(self._kernels(self._entry, loops))

    def largest(self, count: int) -> list[Kernel]:
        """The `count` kernels with the largest results, the largest first."""
        return sorted(self.kernels, key=lambda each: -each.made)[:count]

    def loops(self) -> list[Loop]:
        """The loops of the entry computation."""
        outer = self._computations[self._entry]
        found = []
        for line in outer.values():
            if line.kind == "while" and (body := _BODY.search(line.text)):
                trips = trips_of(self._computations, outer, line)
                found.append(Loop(line.name, trips, tuple(self._kernels(body[1], 1))))
        return found

    def decoding(self) -> Loop | None:
        """The loop over new tokens: the only one whose number of runs is not in the text.

        None if there is no such loop, as in a training step.
        """
        return next((each for each in self.loops() if each.trips is None), None)

    def _kernels(self, start: str, loops: int) -> Iterator[Kernel]:
        for step in walk(self._computations, start, 1, [], loops):
            line = step.line
            if not (step.fused or line.kind in _FREE or line.kind.endswith("-done")):
                yield self._kernel(line, step.computation, step.times)

    def _kernel(self, line: Line, computation: str, times: int) -> Kernel:
        lines = self._computations[computation]
        operands = [lines[name] for name in line.operands if name in lines]
        largest = max(operands, key=_size, default=line)
        words = self._moves(line)
        where = re.search(r'op_name="([^"]*)"', line.text)
        return Kernel(
            name=line.name,
            kind=line.kind,
            shape=line.shape.strip(),
            times=times,
            made=_size(line),
            read=sum(self._read(line, index, each) for index, each in enumerate(operands)),
            written=self._written(line, computation),
            copies=words,
            source=self._source(computation, largest) if words else "",
            dtypes=(_dtype(largest), _dtype(line)),
            where=where[1] if where else "",
        )

    def _inner(self, line: Line) -> Lines:
        """The instructions of a fusion."""
        return self._computations[called(line)[0]]

    def _moves(self, line: Line) -> str:
        """Words for what a kernel does if it only copies in memory, else ""."""
        if _ON_CHIP.search(line.shape):
            return ""
        if line.kind != "fusion":
            return _MOVES.get(line.kind, "")
        inner = self._inner(line).values()
        # Arithmetic on scalars is that of an index.
        if not all(each.kind in _MOVES or _elements(each) == 1 for each in inner):
            return ""
        words = {_MOVES.get(each.kind, "") for each in inner if _elements(each) > 1}
        return ", ".join(sorted(words - {""}))

    def _read(self, line: Line, index: int, operand: Line) -> int:
        """The bytes that a kernel reads of its operand with that index."""
        if _ON_CHIP.search(operand.shape):
            return 0
        return _size(operand) * self._used(line, index, operand) // max(_elements(operand), 1)

    def _used(self, line: Line, index: int, operand: Line) -> int:
        """The elements that an instruction reads of its operand with that index."""
        whole = _elements(operand)
        if line.kind == "fusion":
            inner = self._inner(line)
            own = next((each for each in inner.values() if _number(each) == index), None)
            return whole if own is None else self._used_by_all(own, inner)
        if index == 0 and line.kind in _SLICES:
            return min(whole, _elements(line))
        if index == 0 and line.kind == "dynamic-update-slice":
            return 0  # updated in place
        return whole

    def _used_by_all(self, own: Line, inner: Lines) -> int:
        """The elements that the instructions of a fusion read of its result `own`."""
        total = 0
        for line in inner.values():
            for index, name in enumerate(line.operands):
                if name == own.name:
                    passes = line.kind in (*_SAME, "convert", "transpose")
                    again = self._used_by_all(line, inner) if passes and not line.root else None
                    total += self._used(line, index, own) if again is None else again
        return min(total, _elements(own))

    def _written(self, line: Line, computation: str) -> int:
        """The bytes that a kernel writes; an update in place writes the update alone."""
        if _ON_CHIP.search(line.shape):
            return 0
        if line.kind == "fusion":
            inner = self._inner(line)
            root = next(each for each in inner.values() if each.root)
            results = [inner[each] for each in root.operands] if root.kind == "tuple" else [root]
        else:
            inner, results = self._computations[computation], [line]
        total = 0
        for each in results:
            while each.kind in ("bitcast", "reshape", "copy") and each.operands[0] in inner:
                each = inner[each.operands[0]]
            update = each.kind == "dynamic-update-slice"
            total += _size(inner[each.operands[1]] if update else each)
        return total

    def _source(self, computation: str, line: Line) -> str:
        """JAX's name of the program's argument that a result is, or is a slice of, or ""."""
        lines = self._computations[computation]
        if line.kind in (*_SAME, "slice", "dynamic-slice"):
            return self._source(computation, lines[line.operands[0]])
        if line.kind == "get-tuple-element":
            index, holder = tuple_index(line), lines[line.operands[0]]
            found = None if index is None else self._element(computation, holder, index)
            return "" if found is None else self._source(*found)
        if line.kind != "parameter":
            return ""
        if computation == self._entry:
            name = re.search(r'op_name="([^"]*)"', line.text)
            return name[1].replace("\\'", "'") if name else line.name
        outer, call = self._callers[computation]
        number = _number(line)
        if call.kind != "call" or number is None:
            return ""
        return self._source(outer, self._computations[outer][call.operands[number]])

    def _element(self, computation: str, holder: Line, index: int) -> tuple[str, Line] | None:
        """The computation and instruction that make element `index` of a tuple; None: unknown.

        Elements that a loop carries unchanged are made before the loop.
        """
        lines = self._computations[computation]
        if holder.kind == "tuple":
            return computation, lines[holder.operands[index]]
        if holder.kind == "while":
            body = _BODY.search(holder.text)
            if body and self._carries(body[1], index):
                return self._element(computation, lines[holder.operands[0]], index)
        if holder.kind == "parameter" and computation in self._callers:
            outer, loop = self._callers[computation]
            if loop.kind == "while" and self._carries(computation, index):
                start = self._computations[outer][loop.operands[0]]
                return self._element(outer, start, index)
        return None

    def _carries(self, body: str, index: int) -> bool:
        """True if a loop's body leaves element `index` of its carry as it is."""
        lines = self._computations[body]
        root = next(each for each in lines.values() if each.root)
        if root.kind != "tuple":
            return False
        line = lines[root.operands[index]]
        return line.kind == "get-tuple-element" and tuple_index(line) == index


def _shapes(line: Line) -> list[tuple[str, str]]:
    """(dtype, sizes) of a result, or of all of a tuple but a library's working memory."""
    found = SHAPE.findall(line.shape)
    scratch = line.kind == "custom-call" and _SCRATCH.search(line.text) and len(found) > 1
    return found[:-1] if scratch else found[:1] if line.kind == "copy-start" else found


def _size(line: Line) -> int:
    """The bytes of an instruction's result."""
    return sum(shape_bytes(*each) for each in _shapes(line))


def _elements(line: Line) -> int:
    """The number of elements of an instruction's result."""
    return sum(math.prod(int(n) for n in sizes.split(",") if n) for _, sizes in _shapes(line))


def _dtype(line: Line) -> str:
    found = _shapes(line)
    return found[0][0] if found else ""


def _number(line: Line) -> int | None:
    """The number of a computation's parameter; None for other instructions."""
    match = re.search(r"parameter\((\d+)\)", line.text) if line.kind == "parameter" else None
    return int(match[1]) if match else None
