import pytest

from jax_instructblip.data.readers.annotations import (
    AnnotationError,
    field,
    inside,
    pick_layout,
    read_csv,
    read_json,
    read_json_lines,
    text_of,
    texts_of,
    unique,
)
from jax_instructblip.data.records import Record

OURS = {"train": ("q.json", "a.json"), "test": ("q.json",)}
THEIRS = {"train": ("all.json",)}


@pytest.mark.parametrize(
    "there, number, names",
    [
        (("q.json", "a.json", "all.json"), 0, ["q.json", "a.json"]),
        (("q.json", "all.json"), 1, ["all.json"]),
    ],
)
def test_the_first_layout_that_is_whole(tmp_path, there, number, names):
    for name in there:
        (tmp_path / name).touch()
    assert pick_layout(tmp_path, "train", OURS, THEIRS) == (number, [tmp_path / n for n in names])


@pytest.mark.parametrize(
    "split, message",
    [
        ("train", r"lacks files of split 'train': a.json, or else all.json: .*prepare --list"),
        ("val", "split 'val' is not known, expected one of test, train"),
    ],
)
def test_no_layout_is_whole(tmp_path, split, message):
    (tmp_path / "q.json").touch()
    with pytest.raises(AnnotationError, match=message):
        pick_layout(tmp_path, split, OURS, THEIRS)


@pytest.mark.parametrize("parts", [("a.jpg",), ("images", "a.jpg"), ("images/deep", "a..b.jpg")])
def test_paths_inside(tmp_path, parts):
    assert inside(tmp_path, *parts) == str(tmp_path.joinpath(*parts))


@pytest.mark.parametrize("parts", [("/a.jpg",), ("images", "/etc/a"), ("..", "a"), ("a/../../b",)])
def test_paths_outside(tmp_path, parts):
    with pytest.raises(AnnotationError, match="row 3: the path .* leads out of the folder"):
        inside(tmp_path, *parts, where="row 3")


@pytest.mark.parametrize(
    "raw, message",
    [
        (None, "does not exist: .*prepare --list"),
        (b'{"a": [1, 2', "not valid JSON: .*cut off"),
        (b"\xff\xfe{}", "is not UTF-8: .* at byte 0"),
        (b"[]", "found a list at the top, expected an object"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_json_that_cannot_be_read(tmp_path, raw, message):
    path = tmp_path / "a.json"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(AnnotationError, match=message):
        read_json(path, dict)


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert list(read_json_lines(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": 2})]
    path.write_text('{"a": 1}\n[2]\n')
    with pytest.raises(AnnotationError, match=r"a.jsonl:2: found a list, expected an object"):
        list(read_json_lines(path))


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfid,text\r\n7,"a, b"\r\n')
    assert list(read_csv(path, ("id", "text"))) == [(f"{path}:2", {"id": "7", "text": "a, b"})]
    with pytest.raises(AnnotationError, match="no columns answer; found id, text"):
        list(read_csv(path, ("id", "answer")))


@pytest.mark.parametrize(
    "row, kind, message",
    [
        ({"b": 1, "c": 2}, int, "r: no field 'a'; found b, c: is it another release"),
        ({}, int, "r: no field 'a'; found none"),
        ({"a": "1"}, int, "r: a: found text, expected a whole number"),
        ({"a": True}, int, "r: a: found true or false, expected a whole number"),
        ({"a": None}, (str, list), "r: a: found null, expected text or a list"),
    ],
)
def test_fields_that_cannot_be_used(row, kind, message):
    with pytest.raises(AnnotationError, match=message):
        field(row, "a", kind, "r")


def test_texts():
    assert text_of({"a": " b "}, "a", "r") == "b"
    assert texts_of({"a": ["b", " ", "b", " c"]}, "a", "r") == ("b", "b", " c")
    with pytest.raises(AnnotationError, match="r: a is blank"):
        text_of({"a": "\n"}, "a", "r")
    with pytest.raises(AnnotationError, match=r"r: a\[1\]: found a whole number, expected text"):
        texts_of({"a": ["b", 7]}, "a", "r")


@pytest.mark.parametrize("texts, found", [([], "nothing"), (["", " "], "only blank texts")])
def test_lists_without_a_text(texts, found):
    with pytest.raises(AnnotationError, match=f"r: a holds {found}, expected at least one"):
        texts_of({"a": texts}, "a", "r")


def test_ids_are_unique():
    records = [Record(name, ("a.jpg",), "", (), task="t", split="s") for name in "abca"]
    assert list(unique(records[:3])) == records[:3]
    with pytest.raises(AnnotationError, match="id 'a' of t s is used twice: by records 0 and 3"):
        list(unique(records))
