"""`files.json` of a checkpoint folder: the sha256 of every file that holds no leaf.

    {"format": 1, "sha256": {"config.json": "...", "tokenizer/tokenizer.json": "...", ...}}

The hashes of the leaves (arrays) are in `manifest.json`; a damaged manifest no longer fits them.
One flipped bit in a tokenizer or a config would change answers silently, so these files are
compared before they are used. Folders older than `files.json` are read without this check.
"""

import hashlib
import json
import os
from pathlib import Path

from jax_instructblip.checkpoint.manifest import MANIFEST, CheckpointError, listed
from jax_instructblip.files import read_json

FILES = "files.json"
_FORMAT = 1


def write_hashes(folder: str | os.PathLike) -> None:
    """Writes `files.json`, with the hashes of the files that are in the folder now."""
    folder = Path(folder)
    hashes = {
        name: hash_file(folder / name)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and _is_covered(name := path.relative_to(folder).as_posix())
    }
    document = {"format": _FORMAT, "sha256": hashes}
    (folder / FILES).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def verify_hashes(folder: str | os.PathLike) -> None:
    """Compares every file that `files.json` lists with its hash; does nothing if there is no list.

    Raises:
        CheckpointError: names all files that are missing or have other bytes.
    """
    folder = Path(folder)
    if not (folder / FILES).exists():
        return
    try:
        document = read_json(folder / FILES, dict)
        hashes = document.get("sha256")
        if set(document) != {"format", "sha256"} or not isinstance(hashes, dict):
            raise ValueError(f"found the fields {sorted(document)}, expected format and sha256")
        if document["format"] != _FORMAT:
            raise ValueError(f"format is {document['format']!r}, this version reads {_FORMAT}")
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder / FILES} is damaged: {error}") from error
    wrong = []
    for name, expected in hashes.items():
        try:
            if hash_file(folder / name) != expected:
                wrong.append(f"{name}: its bytes have another sha256 than {FILES} says")
        except (OSError, ValueError) as error:
            wrong.append(f"{name}: cannot be read: {error}")
    if wrong:
        claim = f"{folder} is damaged, or was changed: copy or convert it again"
        raise CheckpointError(
            listed(f"{claim} (what you changed yourself, strike out in {FILES})", wrong)
        )


def hash_file(path: Path) -> str:
    """The sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_covered(name: str) -> bool:
    """True for files that `files.json` lists: not itself, `manifest.json` or bytes of leaves."""
    words = name.split("/")
    is_leaf = words[:2] == ["params", "state"] and len(words) == 4 and words[3][:1] != "."
    return not is_leaf and name not in (MANIFEST, FILES)
