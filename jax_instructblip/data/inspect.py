"""Training examples for people to look at: their tokens, which of them are targets, and counts."""

import collections
import itertools
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from jax_instructblip.data.batch import IGNORE
from jax_instructblip.data.captions import CaptionTokenizer
from jax_instructblip.data.conversation import IMAGE, Conversation, ConversationProcessor
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.models.variants import T5Config

_BAR = 40  # characters of the longest bar
Pieces = list[tuple[str, bool]]


def token_counts(example: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Returns the numbers of tokens of a training example, of texts read and of targets, by title.

    A title says what is counted, such as "answer".
    """
    if "caption" in example:
        return {"caption": len(example["caption"])}
    instruction = {}
    if "qformer_tokens" in example:
        instruction["instruction for the Q-Former"] = len(example["qformer_tokens"])
    return {
        **instruction,
        "tokens of the language model": len(example["tokens"]),
        "answer": int((example["targets"] != IGNORE).sum()),
    }


def histogram(name: str, counts: Sequence[int]) -> list[str]:
    """Returns lines of text: a bar chart of how many samples have up to 8, 16, 32 ... tokens.

    `counts` has the number of tokens of each sample, at least one; `name` is the title.
    """
    lines = [f"{name}: {min(counts)} to {max(counts)} tokens, median {statistics.median(counts):g}"]
    # 1..8 -> 8, 9..16 -> 16: the padded lengths that a bucket would have.
    bins = collections.Counter(max(8, 1 << (count - 1).bit_length()) for count in counts)
    top = min(bins)
    while top <= max(bins):
        low = 1 if top == 8 else top // 2 + 1
        bar = "#" * -(-_BAR * bins[top] // max(bins.values()))
        lines.append(f"  {f'{low}-{top}':>9} {bins[top]:>8} {bar}".rstrip())
        top *= 2
    return lines


def token_rows(example: Mapping[str, np.ndarray], text: TextProcessor) -> dict[str, Pieces]:
    """Returns the token sequences of a training example, by a title that says who reads them.

    A title is such as "Q-Former reads"; a sequence is a list of (token text, True if the token is a
    target of the loss).
    """
    pieces = text.llm.convert_ids_to_tokens(example["tokens"].tolist())
    rows = {}
    if "qformer_tokens" in example:
        instruction = text.qformer.convert_ids_to_tokens(example["qformer_tokens"].tolist())
        rows["Q-Former reads"] = [(piece, False) for piece in instruction]
    if isinstance(text.variant.llm, T5Config):
        answer = text.llm.convert_ids_to_tokens(example["targets"].tolist())
        rows["encoder reads"] = [(piece, False) for piece in pieces]
        rows["decoder writes"] = [(piece, True) for piece in answer]
    else:
        learned = (example["targets"] != IGNORE).tolist()
        rows["LLM reads"] = list(zip(pieces, learned, strict=True))
    return rows


def caption_rows(example: Mapping[str, np.ndarray], text: CaptionTokenizer) -> dict[str, Pieces]:
    """Returns a caption's tokens as `token_rows` does: as they are compared, and as written.

    `example` is the result of `CaptionTokenizer.example`. Only a model that writes captions has the
    second sequence.
    """
    pieces = text.tokenizer.convert_ids_to_tokens(example["caption"].tolist())
    rows = {"Q-Former reads": [(piece, False) for piece in pieces]}
    if text.variant.qformer.caption_head:
        written = [(piece, True) for piece in pieces[1:]]
        rows["Q-Former writes"] = [(text.tokenizer.bos_token, False), *written]
    return rows


def turn_rows(
    conversation: Conversation, chat: ConversationProcessor, kept: int
) -> dict[str, Pieces]:
    """Returns the first `kept` tokens of a training conversation by turn, and their ids.

    The titles are `user 1`, `ids 1`, `assistant 2`, `ids 2` ...; each image is a piece `<image>`.
    """
    encoded = chat.encode(conversation, answered=True)
    rows: dict[str, Pieces] = {}
    pieces = chat.tokenizer.convert_ids_to_tokens(encoded.tokens[:kept])
    images = collections.Counter(encoded.image_at)
    for index, piece in enumerate(pieces):
        number, learned = encoded.turns[index], encoded.targets[index] != IGNORE
        title = f"{conversation.turns[number - 1].speaker} {number}"
        for name, text in ((title, piece), (f"ids {number}", str(encoded.tokens[index]))):
            row = rows.setdefault(name, [])
            row += [(IMAGE, False)] * images[index]
            row.append((text, learned))
    return rows


def render(pieces: Pieces) -> str:
    """Returns the tokens on one line, with brackets around every run of targets."""
    runs = []
    for asked, run in itertools.groupby(pieces, key=lambda pair: pair[1]):
        words = " ".join(piece for piece, _ in run)
        runs.append(f"[{words}]" if asked else words)
    return " ".join(runs)
