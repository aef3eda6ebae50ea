"""Captions and boxes: written as LLaVA wrote them, read from its files, bad ones named by line."""

import json

import pytest

from jax_instructblip.data.contexts import Box, Context, parse_context, read_contexts
from jax_instructblip.data.records import RecordError

TEXT = "A cup.\nTwo cups, one broken\n\ncup: [0.0, 0.25, 1.0, 0.333]\nold cup: [0.1, 0.2, 0.1, 1.0]"
CUP = {"category": "cup", "bbox": [0, 0.25, 1, 0.33333]}


def test_a_context_is_written_with_three_digits_and_read_again():
    boxes = (Box("cup", (0, 0.25, 1, 0.33333)), Box("old cup", (0.1, 0.2, 0.1, 1.0)))
    context = Context("x", "", ("A cup.", "Two cups, one broken"), boxes)
    assert context.text() == TEXT
    assert parse_context(TEXT, "x").text() == TEXT
    assert context.text(boxes=False) == TEXT.partition("\n\n")[0]


def test_empty_lines_of_captions_are_left_out():
    """Behind an empty line there are boxes."""
    context = Context("x", "", ("A cup.\n", "\r\n \nTwo cups, one broken"))
    assert context.text() == TEXT.partition("\n\n")[0]


def test_the_eight_published_contexts_are_written_byte_for_byte(shared):
    paths = sorted((shared / "data/llava/prompts").rglob("*_caps.txt"))
    assert len(paths) == 8
    for path in paths:
        context = parse_context(path.read_bytes().decode(), str(path))
        assert len(context.captions) == 5
        assert context.text().encode() == path.read_bytes()


def test_the_eighty_published_lines(shared):
    path = shared / "data/llava/caps_boxes_coco2014_val_80.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    contexts = read_contexts(path)
    assert [context.id for context in contexts] == [row["id"] for row in rows]
    for context, row in zip(contexts, rows, strict=True):
        written = [f"{each['category']}: {each['bbox']}" for each in row["instances"]]
        assert [str(box) for box in context.boxes] == written
        assert list(context.captions) == row["captions"] and context.image == row["image"]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"image": ""}, "image is empty"),
        ({"id": 1.5}, "id is float 1.5"),
        ({"captions": []}, "captions is an empty list"),
        ({"captions": ["a", " ", 3]}, "captions[1] is blank"),
        ({"captions": "a"}, "captions is text, expected a list"),
        ({"caption": "a"}, "captions and caption are given"),
        ({"instances": {}}, "instances is an object"),
        ({"instances": [CUP, 3]}, "instances[1]: found int 3"),
        ({"instances": [{**CUP, "category": ""}]}, "instances[0]: category is text, expected"),
        ({"instances": [{**CUP, "bbox": [0, 0, 1]}]}, "cup has 3 coordinates"),
        ({"instances": [{**CUP, "bbox": [0, 0, 1, "1"]}]}, "bbox is a list, expected four num"),
        ({"instances": [{**CUP, "bbox": [10, 20, 110, 90]}]}, "[10, 20, 110, 90], expected 0 <="),
        ({"instances": [{**CUP, "bbox": [-0.1, 0, 1, 1]}]}, "box of cup is [-0.1, 0, 1, 1]"),
        ({"instances": [{**CUP, "bbox": [0.5, 0, 0.4, 1]}]}, "expected 0 <= x1 <= x2 <= 1"),
    ],
)
def test_bad_lines_are_named(tmp_path, fields, problem):
    path = tmp_path / "c.jsonl"
    good = {"id": 1, "image": "a.jpg", "captions": ["a"], "instances": [CUP]}
    path.write_text(f"{json.dumps(good | {'id': 2})}\n\n{json.dumps(good | fields)}\n")
    with pytest.raises(RecordError) as error:
        read_contexts(path)
    assert f"{path}:3: " in str(error.value) and problem in str(error.value)


def test_lines_that_are_no_object_or_repeat_an_id_are_all_named(tmp_path):
    path = tmp_path / "c.jsonl"
    row = '{"image": "a.jpg", "captions": ["a"]}'
    path.write_text(f'{row}\n{row}\n[]\n{{"image"\n')
    with pytest.raises(RecordError) as error:
        read_contexts(path)
    assert [problem.split(": ")[0] for problem in error.value.problems] == [
        f"{path}:{line}" for line in (2, 3, 4)
    ]
    path.write_text("\n")
    with pytest.raises(RecordError, match="holds no contexts"):
        read_contexts(path)


def test_one_caption_in_place_of_several(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"image": "a", "caption": "b\\nc"}\n{"image": "d", "caption": ["e", "f"]}\n')
    assert [context.text() for context in read_contexts(path)] == ["b\nc", "e\nf"]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", ["1"]),
        ("\ncup: [0, 0, 1, 1]", ["1"]),
        ("a\n \n\ncup [0, 0, 1, 1]\ncup: [0, 0, 1]\ncup: [0, 0, 1, 1.2]\n", ["2", "4", "5", "6"]),
        ("a\n\ncup: [0, 0, 1, x]\n\n", ["3"]),
    ],
)
def test_bad_lines_of_a_text_are_named(text, lines):
    with pytest.raises(RecordError) as error:
        parse_context(text, "f")
    assert [problem.split(":")[1] for problem in error.value.problems] == lines
