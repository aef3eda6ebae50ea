import copy
import json

import pytest

from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.readers.dialogue import (
    DATASETS,
    part_of,
    read_llava_conversation,
    read_llava_detail,
    read_llava_reasoning,
    read_visual_dialog,
)
from jax_instructblip.data.records import Record

VISDIAL = {
    "version": "1.0",
    "data": {
        "questions": ["is it red ", "how many"],
        "answers": ["yes", "two", "no"],
        "dialogs": [
            {
                "image_id": 42,
                "caption": "a bus",
                "dialog": [
                    {"question": 0, "answer": 2, "answer_options": [1, 2], "gt_index": 1},
                    {"question": 1, "answer": 1, "answer_options": [1, 0], "gt_index": 0},
                ],
            }
        ],
    },
}


def visdial(folder, document, split="val"):
    (folder / f"visdial_1.0_{split}.json").write_text(json.dumps(document))
    return read_visual_dialog(folder, split)


def test_each_round_of_visual_dialog(tmp_path):
    first, second = visdial(tmp_path, VISDIAL)
    image = tmp_path / "VisualDialog_val2018" / "VisualDialog_val2018_000000000042.jpg"
    assert first == Record(
        id="42:1",
        images=(str(image),),
        prompt="is it red",
        answers=("no",),
        task="visual_dialog",
        choices=("two", "no"),
        split="val",
        correct=1,
        context="a bus",
    )
    assert second.history == (("is it red", "no"),)
    assert (second.id, second.correct, second.answers) == ("42:2", 0, ("two",))


def test_the_last_round_of_a_hidden_dialogue(tmp_path):
    hidden = copy.deepcopy(VISDIAL)
    hidden["data"]["dialogs"][0]["dialog"] = [
        {"question": 0, "answer": 2},
        {"question": 1, "answer_options": [1, 0]},
    ]
    (record,) = visdial(tmp_path, hidden, "test")
    assert (record.id, record.correct, record.answers) == ("42:2", -1, ())
    assert (record.choices, record.history) == (("two", "yes"), (("is it red", "no"),))
    assert record.images[0].endswith("test2018/VisualDialog_test2018_000000000042.jpg")


def test_visual_dialog_whole(shared, tmp_path):
    extract = shared / "data" / "visdial" / "visdial_1.0_val_crowdsourced.json"
    (tmp_path / "visdial_1.0_val.json").symlink_to(extract)
    records = list(read_visual_dialog(tmp_path, "val"))
    assert len(records) == 97 * 10
    assert {len(record.choices) for record in records} == {100}
    assert all(record.choices[record.correct] == record.answers[0] for record in records)
    assert [len(record.history) for record in records[:20]] == 2 * list(range(10))

    first, third, last = records[0], records[2], records[-1]
    assert (first.id, first.prompt) == ("239030:1", "what color is the tablet")
    assert (first.context, first.correct) == ("a nokia tablet pc in a keyboard dock", 45)
    assert first.answers == ("black and silver",)
    assert (first.choices[0], first.choices[99]) == ("yes", "a 50's model")
    assert (third.id, third.prompt, third.correct) == ("239030:3", "is it on a table", 0)
    assert third.history == (
        ("what color is the tablet", "black and silver"),
        ("is it on a desk", "no"),
    )
    assert (last.id, last.correct) == ("322815:10", 30)
    assert last.prompt == "can you see any more of the counters"
    assert last.history[1] == (
        "is there an oven as well or just the stovetop",
        "there is an oven",
    )


def round_one(**changed):
    document = copy.deepcopy(VISDIAL)
    document["data"]["dialogs"][0]["dialog"][0].update(changed)
    return document


BAD_VISDIAL = [
    (round_one(gt_index=2), "image 42, round 1: gt_index is 2, expected 0 to 1"),
    (round_one(gt_index=-1), "gt_index is -1, expected 0 to 1"),
    (round_one(gt_index=0), "gt_index 0 is 'two', but the answer is 'no'"),
    (round_one(question=2), "round 1: question is 2, but the list has 2 texts"),
    (round_one(question=-1), "question is -1, but the list has 2 texts"),
    (round_one(answer=3), "answer is 3, but the list has 3 texts"),
    (round_one(answer_options=[1, 9]), "answer_options is 9, but the list has 3 texts"),
    (round_one(question="is it red"), "question: found text, expected a whole number"),
    ({"data": {"questions": []}}, "no field 'answers'; found questions"),
    ({"data": VISDIAL["data"] | {"answers": ["yes", " "]}}, "answers[1]: text is blank"),
    (
        {"data": VISDIAL["data"] | {"dialogs": 2 * VISDIAL["data"]["dialogs"]}},
        "id '42:1' of visual_dialog val is used twice: by records 0 and 2",
    ),
]


@pytest.mark.parametrize(("document", "message"), BAD_VISDIAL)
def test_bad_visual_dialog(tmp_path, document, message):
    with pytest.raises(AnnotationError) as error:
        list(visdial(tmp_path, document))
    assert message in str(error.value)


def said(*texts):
    return [
        {"from": "gpt" if index % 2 else "human", "value": text} for index, text in enumerate(texts)
    ]


def dialogue(name, *texts):
    return {"id": name, "image": f"{name}.jpg", "conversations": said(*texts)}


TALK = dialogue("1", "What?\n<image>", "A bus.", "<image>\nWhere? ", "Here.")
DETAIL = dialogue("2", "What is this photo about'?\n<image>", "A street.")
REASONING = dialogue("1", "<image>\nWhy?", "Since.")
READERS = [
    (read_llava_conversation, "conversation_58k.json", TALK, ["1:1", "1:2"]),
    (read_llava_detail, "detail_23k.json", DETAIL, ["2:1"]),
    (read_llava_reasoning, "complex_reasoning_77k.json", REASONING, ["1:1"]),
]


def write(path, document):
    path.write_text(json.dumps(document))


def test_each_answer_of_a_conversation(tmp_path):
    write(tmp_path / "conversation_58k.json", [TALK])
    first, second = read_llava_conversation(tmp_path, "train")
    assert first == Record(
        id="1:1",
        images=(str(tmp_path / "train2017" / "1.jpg"),),
        prompt="What?",
        answers=("A bus.",),
        task="llava_conversation",
        split="train",
    )
    assert (second.id, second.prompt, second.answers) == ("1:2", "Where?", ("Here.",))
    assert second.history == (("What?", "A bus."),)


@pytest.mark.parametrize(("read", "file", "row", "ids"), READERS)
@pytest.mark.parametrize("whole", [False, True])
def test_parts_of_llava(tmp_path, read, file, row, ids, whole):
    if whole:
        write(tmp_path / "llava_instruct_150k.json", [DETAIL, TALK, REASONING])
    else:
        write(tmp_path / file, [row])
    assert [record.id for record in read(tmp_path, "train")] == ids


def test_a_second_dialogue_about_an_image(tmp_path):
    other = REASONING | {"image": "coco/train2017/1.jpg"}
    write(tmp_path / "complex_reasoning_77k.json", [REASONING, DETAIL, other])
    records = list(read_llava_reasoning(tmp_path, "train"))
    assert [record.id for record in records] == ["1:1", "2:1", "1#2:1"]
    assert records[2].images == (str(tmp_path / "coco" / "train2017" / "1.jpg"),)


def test_real_questions_tell_the_parts(shared, tmp_path):
    """GPT-4's answers on thirty validation images, a question of each part, put into dialogues."""
    path = shared / "data" / "llava" / "coco2014_val_gpt4_qa_30x3.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    parts = {"detail": "llava_detail", "complex": "llava_reasoning"}
    for row in rows:
        if row["type"] in parts:
            assert part_of([(row["instruction"], row["output"])]) == parts[row["type"]]
    asked = path.with_name("qa90_questions.jsonl").read_text().splitlines()
    for row in map(json.loads, asked):
        if row["category"] in parts:
            assert part_of([(row["text"], "")]) == parts[row["category"]]

    dialogues = []
    for three in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        texts = [text for row in three for text in (row["instruction"], row["output"])]
        name = three[0]["id"]
        dialogues.append(dialogue(name, *texts) | {"image": three[0]["image"]})
    write(tmp_path / "llava_instruct_150k.json", dialogues)
    records = list(read_llava_conversation(tmp_path, "train"))
    assert len(records) == 90
    first, second, last = records[0], records[1], records[-1]
    assert first.id == "000000525439:1"
    assert first.prompt == "What is the position of the skateboard in the image?"
    assert second.images[0].endswith("train2017/COCO_val2014_000000525439.jpg")
    assert second.history == ((first.prompt, first.answers[0]),)
    assert (last.id, len(last.history)) == (f"{rows[-1]['id']}:3", 2)
    assert last.answers == (rows[-1]["output"],)


BAD_LLAVA = [
    (TALK | {"conversations": said("What?")}, "row 0: 1 turns, expected a question and an answer"),
    (TALK | {"conversations": []}, "row 0: 0 turns"),
    (TALK | {"conversations": said("Q", "A")[::-1]}, "conversations[0]: from is 'gpt'"),
    (TALK | {"conversations": said("<image>\n", "A")}, "conversations[0]: value is blank"),
    (TALK | {"image": "../1.jpg"}, "the path '../1.jpg' leads out of the folder"),
    (TALK | {"image": "/1.jpg"}, "the path '/1.jpg' leads out of the folder"),
    ({"id": "1", "conversations": said("Q", "A")}, "no field 'image'; found id, conversations"),
    ([], "row 0: found a list, expected an object"),
]


@pytest.mark.parametrize(("row", "message"), BAD_LLAVA)
def test_bad_llava(tmp_path, row, message):
    write(tmp_path / "conversation_58k.json", [row])
    with pytest.raises(AnnotationError) as error:
        list(read_llava_conversation(tmp_path, "train"))
    assert message in str(error.value)


def test_damaged_or_missing_llava(tmp_path):
    with pytest.raises(AnnotationError, match="detail_23k.json, or else llava_instruct_150k.json"):
        list(read_llava_detail(tmp_path, "train"))
    (tmp_path / "detail_23k.json").write_text(json.dumps([DETAIL])[:-5])
    with pytest.raises(AnnotationError, match="detail_23k.json is not valid JSON"):
        list(read_llava_detail(tmp_path, "train"))
    with pytest.raises(AnnotationError, match="split 'val' is not known, expected one of train"):
        list(read_llava_detail(tmp_path, "val"))


def test_the_rows_of_the_table():
    assert [(row.name, row.held_in) for row in DATASETS] == [
        ("visual_dialog", False),
        ("llava_conversation", True),
        ("llava_detail", True),
        ("llava_reasoning", True),
    ]
