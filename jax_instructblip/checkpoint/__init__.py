"""Checkpoint folders on disk: leaf by leaf, every file hashed, complete or absent.

A leaf is one array of the parameters or of the optimizer's state. `folder` writes and reads these
folders, `manifest` lists their leaves, and `orbax_leaves` calls Orbax. `leaf_parts` and
`stored_leaf` serve runs in which each process holds parts of leaves. `file_hashes` covers the small
files, `step_meta` the `meta.json` of one checkpoint of a run, and `trees` converts between nested
dicts and paths.
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
