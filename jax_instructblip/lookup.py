"""Looking up a row of a table by a name that a person typed."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

Row = TypeVar("Row")


def find(table: Mapping[str, Row], name: str, kind: str) -> Row:
    """The row of that name; `kind` is what the table holds one of ("dataset").

    Raises:
      ValueError: there is none; the message names those that are spelled most alike, or all.
    """
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(table)}"
        raise ValueError(f"unknown {kind} {name!r}; {hint}")
    return table[name]
