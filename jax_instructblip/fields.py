"""Validation of values that users set: tables of type, range and unit per field.

    TABLE = {
        "steps": whole(1, unit="steps"),
        "dropout": number(0, below=1, special=(-1.0,)),
        "schedule": one_of("cosine", "staircase"),
    }
    check(settings, TABLE)     # settings: a dataclass or a mapping

The arguments `more` of `whole`, `number` and so on are attributes of `Field`, such as `unit`.
Values that int32 or float32 cannot represent are always refused, because the device uses these.
"""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_instructblip.files import path_problem
from jax_instructblip.remote import address_of

INT32 = 2**31 - 1
FLOAT32 = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).tiny)  # smaller magnitudes become 0 on the device

MOST_SECONDS = 1e9  # 30 years; the operating system's timers overflow at about ten times as much

TEXT_LIMIT = 100_000  # characters: ten times the longest context of the models

_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    dict: "an object",
}


@dataclasses.dataclass(frozen=True)
class Field:
    """The values that one setting may have; built by `whole`, `number`, `flag`, `text` and so on.

    Attributes:
      kind: int, float (accepts whole numbers too), bool, str, dict, or tuple (accepts lists too).
      at_least: smallest value.
      at_most: largest value.
      above: exclusive lower bound.
      below: exclusive upper bound.
      choices: for a text, the allowed values.
      special: allowed values outside of the range, such as -1 for "as the checkpoint says".
      optional: None is allowed too.
      local: for a text, it must be a local path and no object-store address.
      stored: for a local path, an object-store address (`gs://...`) is allowed too.
      each: for a tuple, the field that every entry must satisfy.
      unit: the unit in messages, such as "steps".
    """

    kind: type
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    special: tuple[Any, ...] = ()
    optional: bool = False
    local: bool = False
    stored: bool = False
    each: "Field | None" = None
    unit: str = ""

    def problems(self, name: str, value: Any) -> list[str]:
        """Returns messages that say why `value` is not allowed; [] if it is.

        They begin with `name`.
        """
        if self.optional and value is None:
            return []
        if self.kind is tuple and self.each is not None and isinstance(value, tuple | list):
            entries = [(f"{name}[{index}]", entry) for index, entry in enumerate(value)]
            return [reason for entry in entries for reason in self.each.problems(*entry)]
        if not _is_a(self.kind, value):
            expected = _NAMES.get(self.kind, "")
            ranged = self._range()
            if self.kind is tuple and self.each is not None:
                expected = f"a tuple, each of it {_NAMES[self.each.kind]}"
            elif ranged and self.kind is not bool:
                expected = f"{expected}, {ranged}" if not self.choices else ranged
            return [f"{name} is {_show(value)}, expected {expected}{self._also()}"]
        if self.kind is str:
            local = self.local and not (self.stored and address_of(value))
            if problem := text_problem(value) or (local and path_problem(value)):
                return [f"{name} {problem}"]
            good = not self.choices or value in self.choices
        elif self.kind in (bool, dict):
            good = True
        else:
            good = value in self.special or self._in_range(value)
        if good:
            return []
        finite = "" if self.kind is not float or _is_finite(value) else "a finite float32"
        expected = ", ".join(filter(None, [finite, self._range()]))
        return [f"{name} is {_show(value)}, expected {expected}{self._also()}"]

    def _in_range(self, value: float) -> bool:
        vanishes = self.kind is float and 0 < abs(value) < SMALLEST
        return (
            not vanishes
            and (self.kind is int or _is_finite(value))
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _range(self) -> str:
        if self.choices:
            return f"one of {', '.join(each or repr(each) for each in self.choices)}"
        words = [
            f"{word} {bound:,}"
            for word, bound in (
                ("at least", self.at_least),
                ("above", self.above),
                ("at most", self.at_most),
                ("below", self.below),
            )
            if bound not in (None, FLOAT32)
        ]
        return " and ".join(words)

    def _also(self) -> str:
        words = [f" or {value}" for value in self.special] + [" or None"] * self.optional
        return "".join(words) + (f" ({self.unit})" if self.unit else "")


def whole(at_least: int = -INT32, at_most: int = INT32, **more: Any) -> Field:
    """Returns a field that accepts integers from `at_least` to `at_most`, but not True or 3.0."""
    return Field(int, at_least=at_least, at_most=at_most, **more)


def number(at_least: float | None = None, at_most: float = FLOAT32, **more: Any) -> Field:
    """Returns a field that accepts finite numbers from `at_least` to `at_most`, but not True."""
    return Field(float, at_least=at_least, at_most=at_most, **more)


def flag(**more: Any) -> Field:
    """Returns a field that accepts True and False; 0 and 1 are refused."""
    return Field(bool, **more)


def text(**more: Any) -> Field:
    """Returns a field that accepts any text."""
    return Field(str, **more)


def path(*, stored: bool = False, **more: Any) -> Field:
    """Returns a field that accepts a local path or ""; with `stored`, also a store address."""
    return Field(str, local=True, stored=stored, **more)


def one_of(*choices: str, **more: Any) -> Field:
    """Returns a field that accepts the texts in `choices`."""
    return Field(str, choices=choices, **more)


def several(each: Field, **more: Any) -> Field:
    """Returns a field that accepts tuples and lists, also empty, of values that `each` accepts."""
    return Field(tuple, each=each, **more)


def mapping(**more: Any) -> Field:
    """Returns a field that accepts any dict."""
    return Field(dict, **more)


def find_problems(values: Any, table: Mapping[str, Field], prefix: str = "") -> list[str]:
    """Returns messages for all values of a dataclass or mapping that `table` does not allow.

    Names without a row in `table` are ignored; `prefix` precedes names in the messages.
    """
    if not isinstance(values, Mapping):
        values = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
    return [
        problem
        for name, value in values.items()
        if name in table
        for problem in table[name].problems(prefix + name, value)
    ]


def check(values: Any, table: Mapping[str, Field], *, prefix: str = "", title: str = "") -> None:
    """Raises a ValueError that lists every value that its row of `table` does not allow.

    `values`, `table` and `prefix` are as in `find_problems`; `title` is the message's first line.
    """
    problems = find_problems(values, table, prefix)
    if problems:
        raise ValueError("\n  ".join([title, *problems]) if title else "; ".join(problems))


def text_problem(text: str) -> str:
    """Returns the reason why a text cannot be tokenised or written to a file; "" if it can.

    A text may contain lone surrogates: JSON can express them, and Python makes them of command-line
    bytes that are not UTF-8. Neither files nor tokenizers accept them.
    """
    if len(text) > TEXT_LIMIT:
        return f"has {len(text):,} characters, at most {TEXT_LIMIT:,} are read"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"{text[error.start]!r} at character {error.start} is "
        if 0xDC80 <= code <= 0xDCFF:
            what += f"the byte 0x{code - 0xDC00:X} of another encoding than UTF-8"
        else:
            what += "half of a surrogate pair"
        return f"cannot be written as UTF-8: {what}"
    return ""


def _is_a(kind: type, value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return kind is bool
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real)
    return isinstance(value, (tuple, list) if kind is tuple else kind)


def _is_finite(value: float) -> bool:
    return abs(value) <= FLOAT32  # False for NaN


def _show(value: Any) -> str:
    shown = repr(value.item() if isinstance(value, np.generic) else value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted names: `{"text.prompt_limit": 128, ...}`.

    `prefix` is put in front of every name.
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= dotted(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
