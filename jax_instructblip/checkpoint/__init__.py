"""Checkpoint folders on disk: leaf by leaf, every file hashed, whole or not at all.

`folder` writes and reads them, `manifest` lists their leaves, `orbax_leaves` is the way through
Orbax, `leaf_parts` and `stored_leaf` are for processes that each hold a part, `file_hashes` covers
the small files and `step_meta` the `meta.json` of one checkpoint of a run; `trees` goes between
nested dicts and paths.
"""

from jax_instructblip.checkpoint.folder import (
    CONFIG,
    PARAMS,
    Place,
    read_config,
    read_leaves,
    read_parts,
    read_tree,
    write_config,
    write_tree,
)
from jax_instructblip.checkpoint.manifest import (
    MANIFEST,
    CheckpointError,
    manifest_bytes,
    manifest_digest,
    read_manifest,
)
from jax_instructblip.checkpoint.trees import Tree, flatten, unflatten

__all__ = [
    "CONFIG",
    "MANIFEST",
    "PARAMS",
    "CheckpointError",
    "Place",
    "Tree",
    "flatten",
    "manifest_bytes",
    "manifest_digest",
    "read_config",
    "read_leaves",
    "read_manifest",
    "read_parts",
    "read_tree",
    "unflatten",
    "write_config",
    "write_tree",
]
