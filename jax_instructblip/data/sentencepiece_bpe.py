"""A LLaMA tokenizer that splits text as the SentencePiece model of the released code does.

transformers 5 differs: a leading space replaces the added one instead of following it, and merges
made from `tokenizer.model` are ordered by id instead of by score, so that two spaces become one
piece before a word is looked for. It keeps no scores, so a `tokenizer.json` that it wrote alone is
mended where the vocabulary is LLaMA's, whose scores are known, and refused where it may matter.
"""

import itertools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import transformers
from tokenizers import models, normalizers

from jax_instructblip.files import parse_json

SPACE = "▁"
# Enough of LLaMA's 32,000 pieces to know them. Their scores fall with their ids; those of spaces
# alone are below all others.
LLAMA_PIECES = {"▁▁": 259, "▁t": 260, "er": 261, "▁▁▁▁": 268, "▁": 29871, "e": 29872, "给": 31999}
LLAMA_SIZE = 32_000


def split_as_sentencepiece(
    tokenizer: transformers.PreTrainedTokenizerFast, folder: pathlib.Path
) -> None:
    """Changes the tokenizer that was read from `folder`.

    Raises:
        ValueError: `tokenizer.model` is damaged; or there is none, and `tokenizer.json` does not
            tell how spaces are split.
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
    """True where merges are ordered by id, and another order would split spaces in another way.

    A file made of a SentencePiece model has every way to put a piece together, so it has more
    merges than pieces; one of a vocabulary that was trained with its merges has not.
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
    """Every way to put a piece together, the piece of the highest score first."""
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
