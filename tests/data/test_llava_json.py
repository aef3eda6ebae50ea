"""JSON files in LLaVA's layout: whole conversations as records, and bad rows named."""

import json

import pytest
from PIL import Image

from jax_instructblip.data.conversation import Conversation, ConversationProcessor, Turn
from jax_instructblip.data.llava_json import read_llava_json
from jax_instructblip.data.records import RecordError
from jax_instructblip.data.sources import open_records
from tests.helpers.chat_tokenizers import chat_tokenizer


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


ROWS = [
    {"id": 7, "image": "a.png", "conversations": [human("<image>\nQ"), gpt("A")], "model": "x"},
    {
        "id": "7",
        "image": ["a.png", "b/c.png"],
        "conversations": [human("<image> or"), gpt("A"), human("this <image>?"), gpt("No")],
    },
    {"conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
]
TURNS = [
    (("user", "<image>\nQ"), ("assistant", "A")),
    (("user", "<image> or"), ("assistant", "A"), ("user", "this <image>?"), ("assistant", "No")),
    (("user", "Q"), ("assistant", "A")),
]


@pytest.fixture
def write(tmp_path):
    """`write(*rows)` is a file of those rows, beside images."""
    (tmp_path / "b").mkdir()
    for name in ("a.png", "b/c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)

    def write(*rows):
        path = tmp_path / "talk.json"
        path.write_text("\ufeff\n " + json.dumps(rows), encoding="utf-8")
        return path

    return write


def test_every_turn_and_mark_is_kept(write, tmp_path):
    records = read_llava_json(write(*ROWS))
    assert [record.id for record in records] == ["7", "7#2", "talk:3"]
    assert records[1].images == (str(tmp_path / "a.png"), str(tmp_path / "b/c.png"))
    for record, turns, images in zip(records, TURNS, (1, 2, 0), strict=True):
        expected = Conversation(record.id, tuple(Turn(*turn) for turn in turns), images)
        assert Conversation.from_record(record) == expected
        own = ConversationProcessor(chat_tokenizer("qwen"), "chatml", visual_tokens=4)
        assert len(own.example(expected)["image_at"]) == images


def test_images_lie_in_another_folder(write, tmp_path):
    path = write({"image": "c.png", "conversations": ROWS[0]["conversations"]})
    (record,) = read_llava_json(path, tmp_path / "b")
    assert record.images == (str(tmp_path / "b" / "c.png"),)


def test_it_is_a_source_of_records(write):
    path = write(*ROWS)
    records, digest = open_records(path, "train")
    assert list(records) == read_llava_json(path)
    assert digest != open_records(write(*ROWS[:2]), "train")[1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (3, "found int 3, expected an object {...}"),
        ({"conversations": None}, "conversations is null, expected a list of turns"),
        ({"conversations": []}, "it has no turns, expected a question and an answer"),
        ({"conversations": [human("Q")]}, "it has 1 turns, the last of which is a question with"),
        (
            {"conversations": [gpt("A"), gpt("A")]},
            "turn 1: the speaker is 'assistant', but the user starts",
        ),
        (
            {"conversations": [{"from": "bot", "value": "Q"}, gpt("A")]},
            "turn 1: from is 'bot', expected one of human, gpt, user, assistant",
        ),
        ({"conversations": [{"value": "Q"}, gpt("A")]}, "turn 1 is not of the form {'from': ..."),
        ({"conversations": [human(3), gpt("A")]}, "turn 1: value is int 3, expected text"),
        (
            {"image": "a.png", "conversations": [human("Q"), gpt("A")]},
            "it has 1 images, but 0 <image> in its questions: each image needs one",
        ),
        (
            {"image": "a.png", "conversations": [human("<image><image>Q"), gpt("A")]},
            "it has 2 <image> in its questions, but 1 images",
        ),
        (
            {"image": "x.png", "conversations": [human("<image>Q"), gpt("A")]},
            "image 'x.png' does not exist (looked for ",
        ),
        ({"image": 3, "conversations": [human("<image>Q"), gpt("A")]}, "image is int 3, expected"),
        (
            {"image": ["b"], "conversations": [human("<image>Q"), gpt("A")]},
            "image 'b' is a folder",
        ),
        (
            {"id": [], "conversations": [human("Q"), gpt("A")]},
            "id is a list, expected text or a whole number",
        ),
    ],
)
def test_a_bad_row_is_named_with_the_reason(write, row, reason):
    path = write(ROWS[0], row)
    with pytest.raises(RecordError) as error:
        read_llava_json(path)
    assert str(error.value).startswith(f"{path}: 1 bad row beside 1 good; nothing was read.")
    assert error.value.problems[0].startswith(f"{path}: row 2: {reason}")


def test_an_empty_list_is_an_error(write):
    with pytest.raises(RecordError, match="holds no records"):
        read_llava_json(write())
