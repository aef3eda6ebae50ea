"""LLaMA folders without `tokenizer.model`: spaces are split as SentencePiece does, or refused."""

import random
import shutil

import pytest
import transformers
from tokenizers import Tokenizer, models

from jax_instructblip.data.sentencepiece_bpe import split_as_sentencepiece
from jax_instructblip.data.tokenizer_files import load_tokenizers

WORDS = "what is the colour of this red-ish cat's 12,000 naïve café 你好 😀 <0x0A> \n \t ( ... ▁ Ün"
PIECES = ["<unk>", "▁", "a", "b", "▁▁", "ab", "▁a", "▁▁▁", "▁ab"]


def texts(count):
    rng = random.Random(0)
    space = lambda: " " * rng.choice([0, 1, 1, 1, 2, 3, rng.randrange(20)])
    for _ in range(count):
        words = [space() + rng.choice(WORDS.split(" ")) for _ in range(rng.randrange(1, 9))]
        yield "".join(words) + space()


def test_a_file_that_transformers_made_of_llamas_splits_as_sentencepiece(shared, tmp_path):
    import sentencepiece

    folder = shared / "data" / "tokenizers"
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "llama" / "tokenizer.model")
    )
    made = transformers.LlamaTokenizer.from_pretrained(folder / "llama")
    made.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    llm, _ = load_tokenizers(tmp_path, folder / "bert-base-uncased", "llama")
    mended, wrong = llm.backend_tokenizer, 0
    for text in texts(2000):
        ids = pieces.encode(text)
        assert mended.encode(text, add_special_tokens=False).ids == ids, repr(text)
        wrong += made.backend_tokenizer.encode(text, add_special_tokens=False).ids != ids
    assert wrong > 400  # there was something to mend


def merges(vocab, scores):
    """Every way to put a piece together, as transformers lists them."""
    ways = [
        (scores(piece), vocab[piece], vocab[piece[:k]], vocab[piece[k:]], (piece[:k], piece[k:]))
        for piece in vocab
        for k in range(1, len(piece))
        if piece[:k] in vocab and piece[k:] in vocab
    ]
    return [way[-1] for way in sorted(ways)]


def wrapped(vocab, merges):
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), unk_token="<unk>"
    )


def test_another_vocabulary_without_scores_is_refused(tmp_path):
    vocab = {piece: i for i, piece in enumerate(PIECES)}
    with pytest.raises(ValueError, match="without its scores.*put the tokenizer.model that it was"):
        split_as_sentencepiece(wrapped(vocab, merges(vocab, lambda piece: 0)), tmp_path)


def test_what_tells_how_spaces_are_split_is_taken_as_it_is(tmp_path):
    vocab = {piece: i for i, piece in enumerate(PIECES)}
    last = merges(vocab, lambda piece: set(piece) == {"▁"})  # by score, as the fast one of old
    trained = [("▁", "▁"), ("a", "b"), ("▁", "a"), ("▁▁", "▁"), ("▁", "ab")]  # one way each
    plain = {piece: i for i, piece in enumerate(p for p in PIECES if "▁▁" not in p)}
    for pieces, ways in (
        (vocab, last),
        (vocab, trained),
        (plain, merges(plain, lambda piece: 0)),
    ):
        tokenizer = wrapped(pieces, ways)
        before = tokenizer.backend_tokenizer.model.__getstate__()
        split_as_sentencepiece(tokenizer, tmp_path)
        assert tokenizer.backend_tokenizer.model.__getstate__() == before
        ids = tokenizer.backend_tokenizer.encode("ab  a").ids
        assert tokenizer.convert_ids_to_tokens(ids)[0] == "▁ab"


def test_the_models_scores_come_first(shared, tmp_path):
    shutil.copy(shared / "golden" / "tokenizers" / "llama" / "tokenizer.model", tmp_path)
    tokenizer = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    split_as_sentencepiece(tokenizer, tmp_path)
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in texts(100):
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == pieces.encode(text), repr(text)
