"""Tokenizer files that are missing, damaged, or no files are named."""

import os
import shutil

import pytest
import tokenizers

from jax_instructblip.conversion import hf_config
from jax_instructblip.data import text
from jax_instructblip.data.byte_tokenizers import splits_bytes
from jax_instructblip.data.tokenizer_files import load_tokenizers, released_special
from tests.data.test_text import tiny_t5, variant
from tests.helpers.language_folders import SPECIAL, make_bytes
from tests.helpers.tiny import TEXT, tiny_variant


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


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_tokenizer_of_bytes_is_its_file_and_names_every_special_token(tmp_path, kind):
    make_bytes(TEXT, **SPECIAL[kind]).save_pretrained(tmp_path)
    assert splits_bytes(tmp_path) and not released_special(tmp_path, "llama")
    llm, _ = load_tokenizers(tmp_path, None, "llama")
    file = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for line in ("what color", " red  \n", "größer 猫", "<|im_end|>", ""):
        ids = llm.backend_tokenizer.encode(line, add_special_tokens=False).ids
        assert ids == file.encode(line).ids
    ids = {f"{name}_id": getattr(llm, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    failures = []
    assert hf_config.tokenizer_ids(tmp_path, failures) == ids and not failures
    assert None not in ids.values() and (ids["bos_id"] == ids["eos_id"]) is False
    if kind == "llama3":
        assert ids["pad_id"] == ids["eos_id"]
    else:
        assert ids["bos_id"] == ids["pad_id"]


def test_texts_of_bytes_have_the_space_in_the_answer(tmp_path):
    make_bytes(TEXT, **SPECIAL["qwen2"]).save_pretrained(tmp_path)
    llm, _ = load_tokenizers(tmp_path, None, "llama")
    ids = {f"llm.{name}_id": getattr(llm, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"llm.vocab": len(llm), "qformer.instruction_aware": False, **ids}
    reader = text.TextProcessor(tiny_variant("llama", **sizes), llm, None)
    example = reader.example("what color is it? ", "größer 猫")
    whole = llm.backend_tokenizer.encode("what color is it? größer 猫").ids
    assert example["tokens"].tolist() == [ids["llm.bos_id"], *whole, ids["llm.eos_id"]]
    assert reader.decode(example["tokens"]) == "what color is it? größer 猫" and reader.rewrites
    assert reader.candidate("red").tolist() == llm.backend_tokenizer.encode(" red").ids
    first = int(reader.llm.backend_tokenizer.encode("!").ids[0])
    assert first == 0 and reader.decode([0]) == "!"  # an id like any other
