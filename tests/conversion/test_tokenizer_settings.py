"""Tokenizers of LLaVA whose files name no special tokens: they get those of LLaMA."""

import json
import shutil

import pytest

from jax_instructblip.backbones.tokenizers import make_llama
from jax_instructblip.conversion.hf_config import tokenizer_ids
from jax_instructblip.conversion.tokenizer_settings import complete_settings, write_settings
from jax_instructblip.data.tokenizer_files import load_tokenizers
from tests.helpers.language_folders import tokenizer_of

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
EDITS = {
    "settings alone": lambda settings: {"legacy": True},
    "empty": lambda settings: dict.fromkeys(NAMES, ""),
    "no padding": lambda settings: settings | {"pad_token": None},
}


@pytest.fixture
def folder(tmp_path):
    tokenizer_of("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("edit", [None, *EDITS])
def test_special_tokens_are_llamas_where_none_is_named(folder, edit):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    assert settings["bos_token"] == "<s>"  # as transformers saves it
    path.unlink()
    if edit is not None:
        path.write_text(json.dumps(EDITS[edit](settings)))
    else:
        found, _ = load_tokenizers(folder, None, "llama", released="llava")
        assert (found.bos_token, found.pad_token_id) == ("<s>", 0)
    failures = []
    assert tokenizer_ids(folder, failures, "llava") == {"bos_id": 1, "eos_id": 2, "pad_id": 0}
    completed = complete_settings(folder)
    write_settings(folder, completed)
    assert complete_settings(folder) is None and not failures
    found, _ = load_tokenizers(folder, None, "llama")
    assert [getattr(found, f"{name}_id") for name in NAMES] == [1, 2, 0, 0]


def test_tokens_that_are_named_stay(folder):
    """Both files name tokens, as in Vicuna v0; those of tokenizer_config.json count."""
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    special = {"pad_token": {"content": "[PAD]"}, "bos_token": "<s>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    assert complete_settings(folder) is None
    rows = len(make_llama([]).get_vocab()) + 500
    found = complete_settings(folder, {rows: "<im_start>"}) or {}
    assert found["bos_token"] == "</s>" and found["pad_token"] == {"content": "[PAD]"}
    assert found["added_tokens_decoder"][str(rows)]["content"] == "<im_start>"


def test_a_tokenizer_of_bytes_keeps_its_own(tmp_path):
    tokenizer_of("llama3").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert complete_settings(tmp_path) is None


VICUNA_V0 = {
    "added_tokens.json": {"[PAD]": 32000, "<im_patch>": 32001, "<im_start>": 32002},
    "special_tokens_map.json": {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "[PAD]"},
    "tokenizer_config.json": {"bos_token": "", "eos_token": "", "unk_token": "<unk>"},
}


@pytest.mark.parametrize(
    ("files", "added", "ids"),
    [
        ({}, {32000: "<im_patch>", 32001: "<im_start>"}, (1, 2, 0)),
        (VICUNA_V0, {}, (2, 2, 32000)),
        (VICUNA_V0, {32003: "<im_end>"}, (2, 2, 32000)),
    ],
    ids=["bare", "v0", "v0 and a token"],
)
def test_llamas_own_tokenizer(shared, tmp_path, files, added, ids):
    shutil.copy(shared / "data" / "tokenizers" / "llama" / "tokenizer.model", tmp_path)
    for name, document in files.items():
        (tmp_path / name).write_text(json.dumps(document))
    settings = complete_settings(tmp_path, added)
    failures = []
    found = tokenizer_ids(tmp_path, failures, "llava", settings)
    assert tuple(found[f"{name}_id"] for name in ("bos", "eos", "pad")) == ids and not failures
    write_settings(tmp_path, settings)
    tokenizer, _ = load_tokenizers(tmp_path, None, "llama")
    assert tuple(getattr(tokenizer, f"{n}_id") for n in (*NAMES[:2], NAMES[3])) == ids
    expected = files.get("added_tokens.json", {}) | {text: id_ for id_, text in added.items()}
    assert len(tokenizer.get_vocab()) == 32000 + len(expected)
    assert {text: tokenizer.convert_tokens_to_ids(text) for text in expected} == expected
