"""Rows that describe keys of Hugging Face's config.json, used for reading and for writing.

    Section("vision_config", (
        Key("hidden_size", "width", AXIS, 1408),          # fills our field `width`, and back
        Fixed("hidden_act", "gelu"),                      # the only value that is supported
        Pair(read_activation, write_activation),          # keys and fields that are not one to one
    ))

A default is the value that transformers uses if a key is missing. Types and ranges are checked
before a value is used, and all complaints about a config are collected.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax_instructblip.fields import Field, flag, number, one_of, text, whole
from jax_instructblip.files import kind_of

SIZE = whole(1)
AXIS = whole(1)  # a size that is the length of some tensor's axis
COUNT = whole(1)  # layers: each has tensors of its own
ID = whole(0)
EPS = number(1e-20, 0.1)
RATE = number(0, below=1)  # of dropout
FLAG = flag()
FLAG_OR_NULL = dataclasses.replace(FLAG, optional=True)
SIZE_OR_NULL = dataclasses.replace(SIZE, optional=True)

__all__ = [
    "AXIS",
    "COUNT",
    "EPS",
    "FLAG",
    "FLAG_OR_NULL",
    "ID",
    "RATE",
    "SIZE",
    "SIZE_OR_NULL",
    "Fixed",
    "Key",
    "Pair",
    "Same",
    "Section",
    "Values",
    "equal",
    "number",
    "one_of",
    "text",
]


@dataclasses.dataclass(frozen=True)
class Key:
    """A key that fills one field of a tower's dataclass of sizes.

    Attributes:
      name: its name in config.json.
      field: the field's name in the dataclass.
      kind: its type and range, such as `SIZE`; `AXIS` and `COUNT` are also compared with the
        tensors.
      default: its value if it is missing.
      else_as: name of an earlier key whose value it has if it is missing or null; "" for none.
    """

    name: str
    field: str
    kind: Field
    default: Any = None
    else_as: str = ""


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A key with only one supported value, which a missing key has, too.

    `written` is False for an obsolete key, which is only read.
    """

    name: str
    value: Any
    written: bool = True


@dataclasses.dataclass(frozen=True)
class Same:
    """A key that must equal the key `as_`, which a `Key` reads.

    A missing key has the value `default`; if that is None, the value of `as_`.
    """

    name: str
    as_: str
    default: Any = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """Keys of config.json and fields of our dataclass that are not one to one.

    Attributes:
      read: function of the section's `Values` that returns the fields.
      write: function of the tower's sizes that returns the keys.
      defaults: values of missing keys that `read` uses.
    """

    read: Callable[["Values"], Mapping[str, Any]]
    write: Callable[[Any], Mapping[str, Any]]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Values(dict[str, Any]):
    """The keys of a section with defaults filled in; `failures` collects complaints about them."""

    def __init__(self, section: str, values: Mapping[str, Any]):
        """Takes the section's name for messages ("" for the top of the document) and its keys."""
        super().__init__(values)
        self.prefix = f"{section}." if section else ""
        self.failures: list[str] = []

    def fail(self, key: str, expected: str) -> None:
        """Adds a complaint about the value of `key`; `expected` says which values are allowed."""
        self.failures.append(f"{self.prefix}{key} is {self[key]!r:.60}; {expected}")

    def checked(self, key: str, kind: Field, default: Any = None) -> Any:
        """Returns the value of a key, or `default` if its type or range is not that of `kind`.

        In the latter case a complaint is added to `failures`.
        """
        problems = kind.problems(self.prefix + key, self[key])
        self.failures += problems
        return default if problems else self[key]


@dataclasses.dataclass(frozen=True)
class Section:
    """One section of config.json and its rows; `name` is "" for the top of the document."""

    name: str
    rows: tuple[Key | Fixed | Same | Pair, ...]

    @property
    def defaults(self) -> dict[str, Any]:
        """The values that transformers uses for missing keys."""
        defaults: dict[str, Any] = {}
        for row in self.rows:
            if isinstance(row, Pair):
                defaults |= row.defaults
            elif isinstance(row, Fixed):
                defaults[row.name] = row.value
            elif row.default is not None:
                defaults[row.name] = row.default
        return defaults

    def read(self, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Returns (fields that the section fills, complaints about it); `config` is the document.

        The fields map names of our dataclass to values; where there are complaints, not all of
        these can be used.
        """
        section = (config.get(self.name) if self.name else config) or {}
        if not isinstance(section, Mapping):
            return {}, [f"{self.name} is {kind_of(section)}, expected an object"]
        values = Values(self.name, {**self.defaults, **section})
        fields: dict[str, Any] = {}
        checked: dict[str, Any] = {}  # by key
        for row in self.rows:
            if isinstance(row, Key):
                if row.else_as and values.get(row.name) is None:
                    checked[row.name] = checked[row.else_as]  # checked above, under that key
                else:
                    checked[row.name] = values.checked(row.name, row.kind)
                fields[row.field] = checked[row.name]
        for row in self.rows:
            if isinstance(row, Fixed) and not equal(values[row.name], row.value):
                values.fail(row.name, f"supported: {row.value!r}")
            elif isinstance(row, Same):
                other = values.get(row.as_)
                if not equal(values.setdefault(row.name, other), other):
                    values.fail(row.name, f"supported: {other!r}")
            elif isinstance(row, Pair):
                fields |= row.read(values)
        vocab = fields.get("vocab")
        for row in self.rows:
            if isinstance(row, Key) and row.kind is ID and vocab is not None:
                if row.name in section and (fields[row.field] or 0) >= vocab:
                    values.fail(row.name, f"expected an id below the vocab_size {vocab}")
        return fields, values.failures

    def write(self, tower: Any) -> dict[str, Any]:
        """Returns the section's keys that describe `tower`, our dataclass of a tower's sizes."""
        keys: dict[str, Any] = {}
        for row in self.rows:
            if isinstance(row, Key):
                keys[row.name] = getattr(tower, row.field)
            elif isinstance(row, Fixed) and row.written:
                keys[row.name] = row.value
            elif isinstance(row, Same):
                keys[row.name] = keys[row.as_]
            elif isinstance(row, Pair):
                keys |= row.write(tower)
        return keys

    def sizes(self, tower: Any) -> list[tuple[str, int, bool]]:
        """Returns (key, value, is_layers) of each size that the tensors' shapes or names show.

        `key` includes the section, as in `vision_config.hidden_size`. `is_layers` is True for a
        number of layers, False for the length of an axis. `tower` is the dataclass of sizes.
        """
        prefix = f"{self.name}." if self.name else ""
        return [
            (prefix + row.name, getattr(tower, row.field), row.kind is COUNT)
            for row in self.rows
            if isinstance(row, Key) and (row.kind is AXIS or row.kind is COUNT)
        ]


def equal(found: Any, wanted: Any) -> bool:
    """Tells whether two values are equal; unlike `==`, it tells True from 1."""
    return isinstance(found, bool) == isinstance(wanted, bool) and found == wanted
