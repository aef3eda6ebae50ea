"""Random conversations in every template and vocabulary: what is learned is the answers alone."""

import random

import numpy as np
import pytest

from jax_instructblip.data.batch import lay_slots
from jax_instructblip.data.chat_templates import CHAT_TEMPLATES
from jax_instructblip.data.conversation import Conversation, ConversationProcessor
from jax_instructblip.data.spec import IGNORE
from jax_instructblip.data.tokenizer_files import load_tokenizers
from tests.helpers.chat_tokenizers import CONTROL, chat_tokenizer
from tests.helpers.conversations import talk
from tests.helpers.released_tokenizers import released_tokenizers

VISUAL = 4
# Texts that go wrong where tokens or labels are searched for.
WORDS = (
    *("a", "cat", "The", "naïve", "你好", "😀", "12,345", "...", "'s", "ASSISTANT:", "USER: hi"),
    *("###", "### Human: x", "</s>", "<s>", "<|im_end|>", "<|eot_id|>", "[/INST]", "\n", "\n\n"),
    *("  ", "\t", "#", "</", "<0x0A>", "assistant", "Assistant: ", "{text}", "{system}", "<unk>"),
)
BY_WORDS = ("t5", "sentencepiece-small")  # white space is not kept
SPACED = ("llama", "mistral", "mistral_v3-released")  # SentencePiece puts one behind an image


@pytest.fixture(scope="module")
def tokenizers(shared, tmp_path_factory):
    """All tokenizers by name, those of the shared folder loaded from their bare vocabularies."""
    folder = shared / "data" / "tokenizers"
    start = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    opt, small = tmp_path_factory.mktemp("opt"), tmp_path_factory.mktemp("small")
    for name in ("vocab.json", "merges.txt"):
        (opt / name).symlink_to(folder / "opt-metaseq" / f"gpt2-{name}")
    (small / "spiece.model").symlink_to(folder / "sentencepiece-small" / "spm_example.model")
    load = lambda path, kind, **special: load_tokenizers(path, None, kind, **special)[0]
    return {name: chat_tokenizer(name) for name in CONTROL} | {
        "llama": load(folder / "llama", "llama", special=start),
        "gpt2": load(folder / "gpt2", "opt"),
        "opt-metaseq": load(opt, "opt"),
        "t5": load(folder / "t5", "t5"),
        "sentencepiece-small": load(small, "t5"),
    }


def random_conversation(rng, rounds, separator):
    def text():
        words = separator.join(rng.choice(WORDS) for _ in range(rng.randrange(1, 9)))
        return words if words.strip() else words + "x"

    texts, images = [], 0
    for index in range(rounds):
        count = rng.choice((0, 0, 1, 1, 2)) if index or rounds > 1 else 1
        marks = ["<image>"] * count
        parts = [text(), *marks] if rng.random() < 0.5 else [*marks, text()]
        texts += [rng.choice(("\n", "", " ")).join(parts), text()]
        images += count
    return talk(*texts, images=images, system=rng.choice((None, "", "Be brief.")))


def in_words(conversation):
    """The conversation in letters and marks that every vocabulary has."""
    known = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,: ")
    simple = lambda text: "".join(c for c in text if c in known).strip() or "x"
    turns = tuple(
        turn._replace(text="<image>".join(map(simple, turn.text.split("<image>"))))
        for turn in conversation.turns
    )
    return Conversation(conversation.id, turns, conversation.images, conversation.system)


def learned_texts(conversation, template):
    """The runs of targets that a template asks for."""
    row = CHAT_TEMPLATES[template]
    answers = [turn.text for turn in conversation.turns[1::2]]
    if template != "v0":
        return [row.answer.replace("{text}", answer) + row.stop for answer in answers]
    runs = [f"### Assistant: {answer}\n###" for answer in answers]
    opening = [] if conversation.system == "" else ["###"]
    return [*opening, *runs[:-1], runs[-1] + " "]


def check_conversation(own, tokenizer, asked, expected, plain):
    """Targets are the `expected` texts, and the prompt is what stands before the last of them."""
    (before,) = tokenizer.encode("x", add_special_tokens=False)[-1:]
    start = len(tokenizer.decode([before]))
    example = own.example(asked)
    targets = example["targets"]
    learned = targets != IGNORE
    np.testing.assert_array_equal(targets[learned], example["tokens"][learned])
    edges = np.flatnonzero(np.diff(np.concatenate([[0], learned, [0]])))
    runs = [
        plain(tokenizer.decode([before, *targets[a:b]])[start:])
        for a, b in edges.reshape(-1, 2).tolist()
    ]
    assert runs == expected
    prompt = own.prompt(Conversation("p", asked.turns[:-1], asked.images, asked.system))
    length = len(prompt["tokens"])
    np.testing.assert_array_equal(prompt["tokens"], example["tokens"][:length])
    np.testing.assert_array_equal(prompt["image_at"], example["image_at"])
    assert learned[length:].all()
    laid = lay_slots(example | {"images": np.zeros((asked.images, 1, 1, 3))}, VISUAL)
    assert len(laid["targets"]) == learned.sum() > 0


def check_targets(tokenizers, template, count):
    """Checks `count` conversations a tokenizer; returns the names of those that fit."""
    rng, fitting = random.Random(template), []
    for name, tokenizer in tokenizers.items():
        if CHAT_TEMPLATES[template].problems(tokenizer):
            continue
        fitting.append(name)
        legacy = rng.random() < 0.5
        own = ConversationProcessor(tokenizer, template, visual_tokens=VISUAL, legacy=legacy)
        plain = (lambda text: "".join(text.split())) if name in BY_WORDS else (lambda text: text)
        for _ in range(count):
            rounds = 1 if template == "plain" else rng.randrange(1, 4)
            asked = random_conversation(rng, rounds, rng.choice(("", " ")))
            if name in BY_WORDS:
                asked = in_words(asked)
            expected = [plain(text) for text in learned_texts(asked, template)]
            if template == "plain" and name in SPACED:
                expected = [f" {text}" for text in expected]
            check_conversation(own, tokenizer, asked, expected, plain)
    return fitting


FITTING = {
    "v0": [*CONTROL, "llama", "gpt2", "opt-metaseq"],
    "v1": ["mistral_v3", "llama", "gpt2", "opt-metaseq", "t5", "sentencepiece-small"],
    "plain": [*CONTROL, "llama", "gpt2", "opt-metaseq"],
    "llama3": ["llama3"],
    "chatml": ["qwen"],
    "mistral": ["llama", "gpt2", "opt-metaseq"],
    "mistral_v3": ["mistral_v3"],
}


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_targets_are_the_answers_and_their_stops(tokenizers, template):
    assert check_targets(tokenizers, template, 60) == FITTING[template]


RELEASED = {
    "v0": ["llama3", "qwen", "tekken", "mistral", "mistral_v3-released"],
    "v1": ["tekken", "mistral", "mistral_v3-released"],
    "plain": ["llama3", "qwen", "tekken", "mistral", "mistral_v3-released"],
    "llama3": ["llama3"],
    "chatml": ["qwen"],
    "mistral": ["mistral"],
    "mistral_v3": ["tekken", "mistral_v3-released"],
}


@pytest.mark.full
@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_the_vocabularies_of_released_models(template, tmp_path):
    """128,000 (Llama 3), 151,643 (Qwen), 32,000, 32,768 and 130,072 (Mistral) pieces."""
    assert check_targets(released_tokenizers(tmp_path), template, 500) == RELEASED[template]
