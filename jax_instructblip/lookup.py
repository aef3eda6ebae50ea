"""Looks up a row of a table by a name that a user typed."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

Row = TypeVar("Row")


def find(table: Mapping[str, Row], name: str, kind: str) -> Row:
    """Returns `table[name]`; `kind`, such as "dataset", is the message's word for a row.

    Raises:
      ValueError: the name is unknown; the message has the nearest names, or all.
    """
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(table)}"
        raise ValueError(f"unknown {kind} {name!r}; {hint}")
    return table[name]
