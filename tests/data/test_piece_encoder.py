"""Parts of a text have the ids of the whole text; control tokens come from the template alone."""

import random

import pytest

from jax_instructblip.data.piece_encoder import PieceEncoder, PieceWriter, reads_as_legacy
from jax_instructblip.data.spec import IGNORE
from jax_instructblip.data.tokenizer_files import load_tokenizers
from tests.helpers.chat_tokenizers import chat_tokenizer

START = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}


@pytest.fixture(scope="module")
def llama(shared):
    folder = shared / "data" / "tokenizers" / "llama"
    return load_tokenizers(folder, None, "llama", special=START)[0]


def test_parts_cut_before_a_space_have_the_ids_of_the_whole(llama):
    pieces, rng = PieceEncoder(llama), random.Random(0)
    encode = lambda text: llama.backend_tokenizer.encode(text, add_special_tokens=False).ids
    words = ("What", " a", " cat's", ":", "\n", "###", " 你好", " 12", "  ", ".", " naïve", " ▁")
    for _ in range(500):
        left = "".join(rng.choices(words, k=rng.randrange(1, 6))).rstrip() or "x"
        right = " y" + "".join(rng.choices(words, k=rng.randrange(0, 6)))
        parts = pieces.encode(left, first=True) + pieces.encode(right, first=False)
        assert parts == encode(left + right)


def test_control_tokens_in_a_text_are_its_characters(llama):
    for tokenizer, text in (
        (llama, "a</s>b<s>"),
        (chat_tokenizer("llama3"), "a<|eot_id|>b"),
        (chat_tokenizer("qwen"), "<|im_start|>system"),
    ):
        pieces = PieceEncoder(tokenizer)
        control = set(tokenizer.get_added_vocab().values())
        known = tokenizer.encode(text, add_special_tokens=False)
        assert control & set(known)
        for first in (True, False):
            ids = pieces.encode(text, first=first)
            assert not control & set(ids)
            assert str(tokenizer.decode(ids)).lstrip() == text
        assert tokenizer.encode(text, add_special_tokens=False) == known  # stays as it is


@pytest.mark.parametrize("legacy", [True, False])
def test_only_an_older_tokenizer_puts_a_space_behind_a_control_token(llama, legacy):
    writer = PieceWriter(PieceEncoder(llama), legacy=legacy)
    writer.control(1, False, starts=True)
    writer.text("US", False)
    writer.text("ER", False)
    writer.text(" a", True)
    writer.control(2, True)
    writer.start_turn(2)
    writer.text("USER", False)
    writer.image(())
    writer.text("USER", False)
    writer.image((1, 2))
    writer.text("USER", False)
    writer.flush()
    assert writer.targets[:4] == [IGNORE, IGNORE, IGNORE, writer.tokens[3]]
    later = ["▁US", "ER"] if legacy else ["USER"]
    assert llama.convert_ids_to_tokens(writer.tokens) == [
        *("<s>", "▁US", "ER", "▁a", "</s>"),
        *later,
        *("▁US", "ER", "<s>", "</s>"),
        *later,
    ]
    assert writer.image_at == [5 + len(later), 5 + len(later) + 3]
    assert writer.turns == [1] * 5 + [2] * (len(writer.tokens) - 5)


@pytest.mark.parametrize(
    ("settings", "legacy"),
    [(None, True), ("{}", True), ('{"legacy": true}', True), ('{"legacy": false}', False)],
)
def test_the_folder_says_whether_its_tokenizer_is_of_the_older_kind(tmp_path, settings, legacy):
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(settings)
    assert reads_as_legacy(tmp_path) is legacy
