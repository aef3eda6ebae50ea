"""Makes a LLaMA tokenizer split text exactly as the original SentencePiece model does.

LAVIS, the code released with the paper, uses that model. transformers 5 differs in two ways: a
space at the start of a text replaces the space that is always put in front, instead of following
it; and merges made from `tokenizer.model` are ordered by id instead of by score, so that two spaces
become one piece before a space joins its word.

A `tokenizer.json` has no scores. One that is alone, without `tokenizer.model`, is therefore
repaired only if it has LLaMA's vocabulary, whose scores are known, and refused where the order of
merges matters.
"""

import itertools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import transformers
from tokenizers import models, normalizers

from jax_instructblip.files import parse_json

SPACE = "▁"
# Some of LLaMA's 32,000 pieces, by which its vocabulary is recognised. In it, scores fall as ids
# rise; pieces of spaces alone have the lowest scores.
LLAMA_PIECES = {"▁▁": 259, "▁t": 260, "er": 261, "▁▁▁▁": 268, "▁": 29871, "e": 29872, "给": 31999}
LLAMA_SIZE = 32_000


def split_as_sentencepiece(
    tokenizer: transformers.PreTrainedTokenizerFast, folder: pathlib.Path
) -> None:
    """Replaces the normalizer and the merges of the tokenizer that was read from `folder`.

    Raises:
        ValueError: `tokenizer.model` is damaged; or it is missing, and the order of the merges
            cannot be known from `tokenizer.json`.
    """
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    path = folder / "tokenizer.model"
    if path.is_file():
        import sentencepiece  # only LLaMA folders with tokenizer.model need it

        try:
            pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}): copy it again") from error
        vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
        backend.model = _model(tokenizer, vocab, pieces.get_score)
        return
    written = parse_json(backend.to_str())["model"]
    vocab = written.get("vocab")
    if not isinstance(vocab, dict) or not _lost_scores(written):
        return
    if len(vocab) != LLAMA_SIZE or not LLAMA_PIECES.items() <= vocab.items():
        raise ValueError(
            f"{folder / 'tokenizer.json'} was made of a SentencePiece model without its scores, so "
            "it does not tell how spaces in a row are split: put the tokenizer.model that it was "
            "made of beside it"
        )
    spaces = {i for piece, i in vocab.items() if _is_space(piece)}
    backend.model = _model(tokenizer, vocab, lambda i: float("-inf") if i in spaces else -i)


def _lost_scores(written: Mapping[str, Any]) -> bool:
    """Tells whether merges are ordered by id, though another order would split spaces otherwise.

    `written` is the model in a tokenizer.json. One made from a SentencePiece model lists every way
    to join two pieces to a third, so it has more merges than pieces; one that was trained with its
    merges has one merge a piece, and their order is right.
    """
    vocab, merges = written["vocab"], [tuple(pair) for pair in written["merges"]]
    merged_ids = [vocab.get("".join(pair), -1) for pair in merges]
    if len(merged_ids) == len(set(merged_ids)):
        return False
    by_id = all(one <= other for one, other in itertools.pairwise(merged_ids))
    return by_id and any(_is_space(piece) and len(piece) > 1 for piece in vocab)


def _is_space(piece: str) -> bool:
    return set(piece) == {SPACE}


def _model(
    tokenizer: transformers.PreTrainedTokenizerFast,
    vocab: dict[str, int],
    score: Callable[[int], float],
) -> models.BPE:
    """Returns a BPE model with every way to join two pieces to a third, highest `score` first."""
    ranked = []
    for piece, i in vocab.items():
        for k in range(1, len(piece)):
            left, right = piece[:k], piece[k:]
            if left in vocab and right in vocab:
                ranked.append((-score(i), i, vocab[left], vocab[right], left, right))
    return models.BPE(
        vocab=vocab,
        merges=[(left, right) for *_, left, right in sorted(ranked)],
        unk_token=tokenizer.unk_token,
        fuse_unk=True,
        byte_fallback=True,
    )
