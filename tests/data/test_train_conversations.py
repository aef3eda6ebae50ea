"""Batches of whole conversations: packed, with other numbers of images, replaced and cut to fit."""

import pickle

import numpy as np
import pytest

from jax_instructblip.data.conversation import Conversation, ConversationProcessor
from jax_instructblip.data.loader import HOST_KEYS
from jax_instructblip.data.mixture import Mixture, Source
from jax_instructblip.data.records import Record
from jax_instructblip.data.spec import check
from jax_instructblip.data.train_batches import FITTING
from tests.data.test_mixture import RED, make_batches, picture, text

__all__ = ["text"]  # the fixture
pytestmark = pytest.mark.parametrize("text", ["llama"], indirect=True)

WORDS = "what color is this image number one two".split()


@pytest.fixture
def chat(text):
    """Writes conversations by the template v1, without a system message."""
    return ConversationProcessor.for_model(text, "v1", system="", limit=300)


def talks(count, seed=0, images=(0, 1, 1, 2)):
    """Records of conversations of one to three rounds."""
    rng = np.random.default_rng(seed)
    said = lambda: " ".join(rng.choice(WORDS, int(rng.integers(1, 8))))
    rows = []
    for i in range(count):
        number, rounds = int(rng.choice(images)), int(rng.integers(1, 4))
        history = [(said(), said()) for _ in range(rounds)]
        marks = "<image> " * number
        history[0] = (marks + history[0][0], history[0][1])
        (prompt, answer), earlier = history[-1], tuple(history[:-1])
        pictures = tuple(picture(10 * i + k) for k in range(number))
        rows.append(Record(f"r{i}", pictures, prompt, (answer,), history=earlier))
    return rows


def learned(batch):
    return sorted(batch["targets"][batch["targets"] >= 0].tolist())


def test_batches_hold_the_targets_of_their_conversations(text, chat):
    records = talks(24)
    sources = [Source("a", records, "x")]
    by_id = {record.id: chat.example(Conversation.from_record(record)) for record in records}
    for shared in (1, 2, 4):
        batches = make_batches(text, sources, samples_per_row=shared, chat=chat, augment=False)
        for step in range(6):
            batch, examples = batches[step], [by_id[name] for name in batches.ids(step)]
            check({k: v for k, v in batch.items() if k not in HOST_KEYS}, text.variant)
            assert not batch["replaced"].any()
            targets = np.concatenate([example["targets"] for example in examples])
            assert learned(batch) == sorted(targets[targets >= 0].tolist())
            visual = sum(len(example["image_at"]) for example in examples)
            assert (batch["slots"] >= 0).sum() == visual * text.variant.visual_tokens
            assert (batch["image_sample"] > 0).sum() == visual


def test_a_batch_of_texts_alone_has_an_unused_image(text, chat):
    sources = [Source("a", talks(8, images=(0,)), "x")]
    batch = make_batches(text, sources, chat=chat)[0]
    check({k: v for k, v in batch.items() if k not in HOST_KEYS}, text.variant)
    assert batch["images"].shape[1] == 1 and not batch["image_sample"].any()


def test_a_conversation_that_cannot_be_used_is_replaced(text, chat, caplog):
    bad = Record("bad", (RED,), "what", ("red",), history=(("<image> <image>", "red"),))
    sources = [Source("a", [bad, *talks(3)], "x")]
    batch = make_batches(text, sources, chat=chat)[0]
    assert sorted(batch["replaced"] > 0) == [False, False, False, True]
    assert "bad: replaced: conversation 'bad' cannot be used" in caplog.text
    assert "it has 2 <image> in its questions, but 1 images" in caplog.text


def test_a_replacement_is_cut_to_the_slots_and_targets_that_it_has(text, chat):
    short = Record("d", (b"x",), "what color is this image", ("red",))
    long = [Record(f"l{i}", (RED,), "what", ("red " * 30,)) for i in range(9)]
    batches = make_batches(text, [Source("a", [*long, short], "")], batch_size=1, chat=chat)
    step = next(step for step in range(10) if batches.ids(step) == ["d"])
    batch, room = batches[step], chat.example(Conversation.from_record(short))
    assert batch["replaced"][0] > FITTING
    assert len(learned(batch)) == (room["targets"] >= 0).sum()
    assert batch["truncated"].tolist() == [[0, 0, 1]]
    assert (batch["segments"] > 0).sum() <= len(room["tokens"]) + text.variant.visual_tokens


def test_the_order_of_images_is_a_function_of_seed_and_sample(text, chat):
    records = [Record(f"r{i}", (picture(i),), "what color", ("red",)) for i in range(16)]
    sources = [Source("a", records, "x")]
    firsts = {}
    for order in ("first", "last", "drawn"):
        batches = make_batches(text, sources, chat=chat, image_order=order)
        rows = np.concatenate([batches[step]["slots"] for step in range(10)])
        firsts[order] = np.argmax(rows >= 0, axis=1)
        again = make_batches(text, sources, chat=chat, image_order=order)[3]
        np.testing.assert_array_equal(again["slots"], batches[3]["slots"])
    (first,), (last,) = set(firsts["first"]), set(firsts["last"])
    assert set(firsts["drawn"]) == {first, last} and first < last
    assert 8 < (firsts["drawn"] == first).sum() < 32


def test_templates_make_a_conversation_of_one_round(text, chat):
    record = Record("r", (RED,), "what color", ("red", "red", "blue"), history=(("one", "two"),))
    mixture = Mixture([Source("a", [record], "x")], 0)
    rng = np.random.default_rng(0)
    whole = [mixture.converse(Source("a", [record], "x"), record, rng) for _ in range(40)]
    assert {len(talk.turns) for talk in whole} == {4}
    assert {talk.turns[-1].text for talk in whole} == {"red", "blue"}
    question = Source("a", [record], "x", templates="blip2_question")
    talk = mixture.converse(question, record, rng)
    assert [turn.text for turn in talk.turns[:-1]] == [
        "<image>\none two Question: what color Answer:"
    ]
    with pytest.raises(ValueError, match="it has no answer"):
        mixture.converse(question, Record("r", (RED,), "what", ()), rng)


def test_the_fingerprint_is_of_template_and_order_too(text, chat):
    sources = [Source("a", talks(4), "x")]
    other = ConversationProcessor.for_model(text, "v1", system="x", limit=300)
    prints = [
        make_batches(text, sources, **settings).fingerprint()
        for settings in (
            {},
            {"chat": chat},
            {"chat": other},
            {"chat": chat, "image_order": "drawn"},
        )
    ]
    assert len(set(prints)) == 4


def test_a_copy_for_another_process_makes_the_same_tokens(text, chat):
    record = Record("r", (RED,), "</s> what", ("a</s>b",))
    talk = Conversation.from_record(record)
    copy = pickle.loads(pickle.dumps(chat))
    for name, values in chat.example(talk).items():
        np.testing.assert_array_equal(copy.example(talk)[name], values)


def test_the_qformer_reads_the_first_question(text, chat):
    record = Record("r", (RED,), "Sure?", ("red",), history=(("<image> what color", "red"),))
    example = chat.example(Conversation.from_record(record))
    expected = text.prompt("what color")["qformer_tokens"]
    np.testing.assert_array_equal(example["qformer_tokens"], expected)
    asked = Conversation.from_record(Record("r", (RED,), "what " * 40, ()))
    example = chat.prompt(asked)
    assert len(example["qformer_tokens"]) == text.qformer_limit
    assert example["truncated"].tolist() == [1, 0, 0]
