"""Conversion between nested dicts of leaves and flat dicts by path; a leaf is one array."""

from collections.abc import Mapping
from typing import Any

Tree = dict[str, Any]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested dict by path: `{"llm": {"embed": leaf}}` -> `{"llm/embed": leaf}`.

    `prefix`, such as `model/`, is put before every path. A ValueError names a key that is empty,
    has a "/" or is no string.
    """
    flat = {}
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "/" in key:
            raise ValueError(
                f"key {key!r} under {prefix or 'the root'}: keys are words without '/'"
            )
        flat.update(
            flatten(value, f"{prefix}{key}/")
            if isinstance(value, Mapping)
            else {prefix + key: value}
        )
    return flat


def unflatten(leaves: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`: a nested dict; a ValueError if one leaf lies below another."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"leaf {path!r} lies below another leaf")
        if name in node:
            raise ValueError(f"leaf {path!r} is given twice, or lies above another leaf")
        node[name] = leaf
    return tree
