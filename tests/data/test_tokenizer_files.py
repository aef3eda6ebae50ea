"""Tokenizer files that are missing, damaged, or no files are named."""

import os
import shutil

import pytest

from jax_instructblip.data import text
from jax_instructblip.data.tokenizer_files import load_tokenizers
from tests.data.test_text import tiny_t5, variant


def test_missing_tokenizer_names_folder_and_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*found \['config\.json'\]"):
        text.TextProcessor.load(tmp_path, variant(tiny_t5()))
    with pytest.raises(ValueError, match="kind 'gpt'"):
        load_tokenizers(tmp_path, tmp_path, "gpt")


@pytest.mark.parametrize("whose", ["language model", "Q-Former"])
def test_damaged_tokenizer_names_its_folder(shared, tmp_path, whose):
    files = shared / "data" / "tokenizers"
    folders = {"language model": files / "t5", "Q-Former": files / "bert-base-uncased"}
    folders[whose] = tmp_path
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"the {whose}'s tokenizer in {tmp_path} cannot be read"):
        load_tokenizers(*folders.values(), "t5")


def test_damaged_sentencepiece_model_is_named(shared, tmp_path):
    files = shared / "data" / "tokenizers"
    llama = shared / "golden" / "tokenizers" / "llama"
    llm, bert = load_tokenizers(llama, files / "bert-base-uncased", "llama")
    llm.save_pretrained(tmp_path)
    for content in (b"", b"no model"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer.model cannot be read .*: copy it again"):
            load_tokenizers(tmp_path, files / "bert-base-uncased", "llama")


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model", "tokenizer_config.json"])
def test_a_pipe_among_the_files_of_a_tokenizer_is_not_waited_for(shared, tmp_path, name):
    files = shared / "data" / "tokenizers"
    shutil.copytree(files / "t5", tmp_path / "t5")
    (tmp_path / "t5" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "t5" / name)
    if name != "tokenizer_config.json":
        (tmp_path / "t5" / "tokenizer.model").write_bytes(b"another vocabulary")
    with pytest.raises(OSError, match=f"{name} is a pipe, expected a regular file"):
        load_tokenizers(tmp_path / "t5", files / "bert-base-uncased", "t5")
