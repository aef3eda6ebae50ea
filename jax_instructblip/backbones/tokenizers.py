"""Trains the small tokenizers of the embedded models on the texts of the `shapes` world.

There are three, with the classes and special ids of the released models: BERT's WordPiece for the
Q-Former, T5's Unigram, LLaMA's BPE. Every word of the world is one token; other text is split into
letters.
"""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import BertTokenizer, LlamaTokenizer, T5Tokenizer

from jax_instructblip.data import templates
from jax_instructblip.data.shapes import tasks, world

# Common words that users may type, besides those of the world.
GENERIC = (
    "I you it he she we they this that these those a an the and or not no yes of in on at to "
    "from by with for as is are was be has have do does can could there here one two three four "
    "five six seven eight nine ten zero big small large little left right top bottom above "
    "below next between first last more less most same other color colour shape word letter "
    "picture image photo thing things see show tell say look read write name find what which "
    "who where when why how many much true false white grey brown line dot star animal man "
    "woman day night light dark near far"
).split()
CHARACTERS = string.ascii_letters + string.digits + string.punctuation
# Lists of templates that no question of this world uses.
NOT_OF_THE_WORLD = ("brief", "bare_caption")
SCENES = 400  # enough to meet every word of the world


def world_text() -> list[str]:
    """Returns sentences that contain every template and every word of the `shapes` world."""
    groups = [group for name, group in templates.TEMPLATES.items() if name not in NOT_OF_THE_WORLD]
    text = [line for group in groups for line in group]
    text += [" ".join(names) for names in (world.COLORS, world.SHAPES, world.WORDS)]
    families = {**tasks.FAMILIES, **tasks.CAPTION_FAMILIES}
    for index in range(SCENES):
        scene = world.sample_scene(0, "captions", index)
        rng = world.scene_rng(0, "captions", index, use=1)
        for _, prompt, question in tasks.scene_questions(scene, "train", rng, families):
            text += [prompt, question.answer]
    return text + [" ".join(tasks.NUMBERS)] + [" ".join(GENERIC)] * 2


def count_words(text: Iterable[str]) -> Counter:
    """Returns how often each word (`top-left` is one), punctuation mark and label `(a)` occurs.

    Fields of templates, such as `{question}`, are left out.
    """
    pattern = re.compile(r"\([a-z]\)|\w+(?:-\w+)*|[^\w\s]")
    words = Counter()
    for line in text:
        line = re.sub(r"\{\w+\}", " ", line)
        words.update(pattern.findall(line))
    return words


def make_t5(text: list[str]) -> T5Tokenizer:
    """Returns a T5 Unigram tokenizer scored by log word frequency; pad 0, eos 1, unk 2."""
    words = count_words(text)
    total = sum(words.values())
    score = {
        word if word in string.punctuation else f"▁{word}": math.log(count / total)
        for word, count in words.items()
    }
    rare = min(score.values()) - 5.0
    for character in ["▁", *CHARACTERS]:
        score.setdefault(character, rare)
    pieces = sorted(score.items(), key=lambda item: (-item[1], item[0]))
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces]
    return T5Tokenizer(vocab=vocab, extra_ids=0)


def make_llama(text: list[str]) -> LlamaTokenizer:
    """Trains a LLaMA BPE tokenizer; bos = eos = unk = `</s>` (2), `[PAD]` last, as released."""
    specials = ["<unk>", "<s>", "</s>"]
    draft = Tokenizer(models.BPE(unk_token="<unk>"))
    draft.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(split=False),
            pre_tokenizers.Split(Regex(r"▁?\([a-z]\)|▁?\w+(?:-\w+)*|▁?[^\w\s]"), "isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        special_tokens=specials,
        initial_alphabet=["▁", *CHARACTERS],
        show_progress=False,
    )
    lines = [re.sub(r"\{\w+\}", " ", line) for line in text]
    draft.train_from_iterator(lines, trainer)
    vocab, merges = _prune(draft, lines, specials)
    # bos = eos = unk = </s>, as the released InstructBLIP sets them.
    end: dict[str, Any] = dict(bos_token="</s>", eos_token="</s>", unk_token="</s>")
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, **end)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def make_bert(text: list[str]) -> BertTokenizer:
    """Returns a lower-case WordPiece tokenizer; `[PAD]` 0, `[CLS]` 2, `[SEP]` 3, `[DEC]` last."""
    # BERT splits at every mark, so an option label is three pieces.
    words = {
        part for word in count_words(text) for part in re.findall(r"\w+|[^\w\s]", word.lower())
    }
    letters = sorted(set(CHARACTERS.lower()))
    pieces = sorted(words - set(letters)) + letters
    pieces += [f"##{letter}" for letter in letters if letter.isalnum()]
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {piece: index for index, piece in enumerate([*specials, *pieces])}
    tokenizer = BertTokenizer(vocab=vocab, truncation_side="left")
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def make_tokenizers(kind: str) -> tuple[LlamaTokenizer | T5Tokenizer, BertTokenizer]:
    """Returns the tokenizers of the language model `kind`, 'llama' or 't5', and of the Q-Former."""
    text = world_text()
    return {"t5": make_t5, "llama": make_llama}[kind](text), make_bert(text)


def _prune(
    draft: Tokenizer, lines: list[str], specials: list[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns the vocabulary and merges of `draft` that are needed to tokenise `lines`."""
    model = json.loads(draft.to_str())["model"]
    parts_of = {}
    for merge in model["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        parts_of[left + right] = (left, right)
    needed: set[str] = set()
    pending = {token for line in lines for token in draft.encode(line).tokens}
    while pending:
        piece = pending.pop()
        if piece not in needed:
            needed.add(piece)
            pending.update(parts_of.get(piece, ()))
    keep = [piece for piece in sorted(model["vocab"], key=model["vocab"].get) if piece in needed]
    singles = [piece for piece in ["▁", *CHARACTERS] if piece not in keep]
    names = [*specials, *singles, *(piece for piece in keep if piece not in specials)]
    merges = [pair for piece, pair in parts_of.items() if piece in needed]
    return {piece: index for index, piece in enumerate(names)}, merges
