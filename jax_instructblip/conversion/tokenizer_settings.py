"""Completes the settings of a LLaVA tokenizer: special tokens that its files do not name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_instructblip.conversion.hf_config import read_json
from jax_instructblip.data.byte_tokenizers import splits_bytes
from jax_instructblip.data.special_tokens import RELEASED_SPECIAL

SETTINGS, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
ADDED, VOCABULARY = "added_tokens.json", "tokenizer.json"


def complete_settings(
    folder: Path, added: Mapping[int, str] | None = None
) -> dict[str, Any] | None:
    """Returns the content of the tokenizer_config.json that a LLaVA tokenizer needs.

    Returns None if that in `folder` is complete. Special tokens that neither it nor
    special_tokens_map.json names are those of LLaVA. `added` are further tokens by id. transformers
    reads no other file about tokens beside settings with `added_tokens_decoder`, so these then name
    all.
    """
    settings, special, known, vocabulary = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in (SETTINGS, SPECIAL, ADDED, VOCABULARY)
    )
    usual = {} if splits_bytes(folder) else RELEASED_SPECIAL["llava"]
    named = {name: settings.get(name) or special.get(name) for name in usual}
    if not added and all(named.values()):
        return None
    result = dict(settings)
    result |= {name: token or usual[name] for name, token in named.items()}
    if added:
        decoder = {str(id_): _token(text, special=False) for text, id_ in known.items()}
        decoder |= {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in vocabulary.get("added_tokens") or []
        }
        decoder |= settings.get("added_tokens_decoder") or {}
        decoder |= {str(id_): _token(text, special=True) for id_, text in added.items()}
        result["added_tokens_decoder"] = decoder
    return result


def write_settings(folder: Path, settings: Mapping[str, Any] | None) -> None:
    """Writes `settings` as the tokenizer_config.json of a folder, unless they are None."""
    if settings is not None:
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def _token(text: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": text, **flags, "special": special}
