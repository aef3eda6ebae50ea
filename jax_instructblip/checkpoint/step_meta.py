"""`meta.json` of one checkpoint of a run: its model, and hashes that tie its parts together.

    {"format": 1, "step": 3000, "variant": {...}, "trainable": ["qformer"], "base": {...}, ...,
     "manifests": {"trainable": "...", "optimizer": "..."},      sha256 of each part's manifest
     "sha256": "..."}                                            of all the other fields

Older files lack the last two fields and are read without these checks.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_instructblip.checkpoint.manifest import CheckpointError, manifest_digest
from jax_instructblip.fields import find_problems, mapping, number, several, text, whole
from jax_instructblip.files import parse_json

META = "meta.json"
FORMAT = 1
_MANIFESTS, _SEAL = "manifests", "sha256"
_NEEDED = {"variant": mapping(), "trainable": several(text()), "base": mapping()}
_FIELDS = _NEEDED | {
    "step": whole(0),
    "score": number(optional=True),
    "data": mapping(),
    "text": mapping(),
    "input_format": mapping(),
    _MANIFESTS: mapping(),
}
_BASE = {"path": text(), "sha256": text(), "name": text()}


def seal(meta: Mapping[str, Any]) -> str:
    """The text of a `meta.json` to write: the fields of `meta`, and a sha256 of them."""
    return json.dumps({**meta, _SEAL: _digest(meta)}, indent=1) + "\n"


def parse_meta(raw: bytes, where: str | os.PathLike) -> dict[str, Any]:
    """The fields of the `meta.json` with the bytes `raw`; `where` is its folder, for messages.

    Raises:
        CheckpointError: the bytes are no `meta.json`, or damaged; lists every field that is wrong.
    """
    path = f"{os.fspath(where)}/{META}"
    try:
        meta = parse_json(raw, allow_nan=True)
        if not isinstance(meta, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if meta.get("format", FORMAT) != FORMAT:
        raise CheckpointError(
            f"{path} has format {meta.get('format')!r}, this version reads {FORMAT}"
        )
    stored_seal = meta.pop(_SEAL, None)
    if (stored_seal is not None or _MANIFESTS in meta) and stored_seal != _digest(meta):
        raise CheckpointError(
            f"{path} is damaged: its fields have another sha256 than the one it states"
        )
    if wrong := _wrong_fields(meta):
        raise CheckpointError("\n  ".join([f"{path} is damaged; copy it again:", *wrong]))
    return meta


def read_meta(folder: Path) -> dict[str, Any]:
    """The fields of the `meta.json` in `folder`.

    Raises:
        OSError: there is no such file.
        CheckpointError: the file is damaged; lists every field that is wrong.
    """
    return parse_meta((folder / META).read_bytes(), folder)


def check_manifest(meta: Mapping[str, Any], folder: Path, part: str) -> None:
    """Checks that the manifest of a part, `trainable` or `optimizer`, is the one saved with `meta`.

    The part is the folder `folder / part`. A `meta` without hashes of manifests is accepted.

    Raises:
        CheckpointError: the manifest is another one, for example that of another step.
    """
    wanted = meta.get(_MANIFESTS)
    if wanted is None:
        return
    if manifest_digest(folder / part) != wanted.get(part):
        raise CheckpointError(
            f"{folder / part} is not what was saved with {folder / META}: its manifest is another; "
            "copy the whole checkpoint again"
        )


def bind(meta: Mapping[str, Any], folder: Path, parts: tuple[str, ...]) -> dict[str, Any]:
    """A copy of `meta` with the field `manifests`: the sha256 of each part's manifest.

    `parts` are names of folders in `folder`: `trainable`, `optimizer`.
    """
    return {**meta, _MANIFESTS: {part: manifest_digest(folder / part) for part in parts}}


def _wrong_fields(meta: Mapping[str, Any]) -> list[str]:
    """Sentences about fields that are missing or have the wrong type."""
    filled = {**dict.fromkeys(_NEEDED), **meta}
    wrong = find_problems(filled, _FIELDS)
    if isinstance(base := filled["base"], dict):
        wrong += find_problems({"path": None, "sha256": None} | base, _BASE, "base.")
    return wrong


def _digest(meta: Mapping[str, Any]) -> str:
    canonical = json.dumps(meta, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
