import dataclasses
import json

import pytest
from PIL import Image

from jax_instructblip.data.records import Record, RecordError, read_jsonl, scan_jsonl


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "sub").mkdir()
    return tmp_path


def write(folder, *lines):
    path = folder / "data.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


GOOD = {"image": "a.png", "prompt": "What?", "answer": "a cup"}


def test_records_of_a_good_file(folder):
    path = write(
        folder,
        GOOD,
        "",
        {
            "images": ["a.png", str(folder / "b.png")],
            "prompt": "What happens?",
            "answers": ["a fall", "falling"],
            "id": 7,
            "task": "video",
            "choices": ["a fall", "a jump"],
            "split": "train",
        },
    )
    first, second = read_jsonl(path)
    assert first == Record("data:1", (str(folder / "a.png"),), "What?", ("a cup",))
    assert second == Record(
        id="7",
        images=(str(folder / "a.png"), str(folder / "b.png")),
        prompt="What happens?",
        answers=("a fall", "falling"),
        task="video",
        choices=("a fall", "a jump"),
        split="train",
    )


def test_image_paths_do_not_depend_on_the_current_folder(folder, monkeypatch, tmp_path_factory):
    write(folder, GOOD)
    monkeypatch.chdir(folder)
    assert read_jsonl("data.jsonl")[0].images == ("a.png",)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert read_jsonl(folder / "data.jsonl")[0].images == (str(folder / "a.png"),)


BAD = [
    ("{", "not valid JSON"),
    ("[1, 2]", "found a list, expected an object"),
    ("[" * 100_000, "not valid JSON: nested too deeply"),
    (GOOD | {"anwser": "a cup"}, "unknown field 'anwser'; did you mean 'answer'?"),
    (GOOD | {"zzz": 1}, "unknown field 'zzz'; known: id, image, images"),
    (GOOD | {"file_name": "a.png"}, "unknown field 'file_name'; did you mean 'image'?"),
    (GOOD | {"question": "what?"}, "unknown field 'question'; did you mean 'prompt'?"),
    (GOOD | {"image": "none.png"}, "image 'none.png' does not exist (looked for"),
    (GOOD | {"image": "sub"}, "image 'sub' is a folder"),
    (GOOD | {"image": ""}, "image is empty"),
    (GOOD | {"image": 3}, "image is int 3, expected text"),
    (GOOD | {"images": ["a.png"]}, "'image' and 'images' are both given"),
    ({"images": [], "prompt": "?", "answer": "a"}, "images is an empty list"),
    ({"images": "a.png", "prompt": "?", "answer": "a"}, "images is text, expected a list"),
    ({"images": ["a.png", None], "prompt": "?", "answer": "a"}, "images[1] is null"),
    ({"prompt": "?", "answer": "a"}, "image is missing"),
    (GOOD | {"prompt": " "}, "prompt is empty"),
    ({"image": "a.png", "answer": "a"}, "prompt is missing"),
    (GOOD | {"prompt": ["What?"]}, "prompt is a list, expected text"),
    (GOOD | {"answer": "\n"}, "answer is empty"),
    (GOOD | {"answer": 2}, "answer is int 2, expected text"),
    ({"image": "a.png", "prompt": "?"}, "answer is missing"),
    ({"image": "a.png", "prompt": "?", "answers": []}, "answers is an empty list"),
    ({"image": "a.png", "prompt": "?", "answers": ["a", ""]}, "answers[1] is empty"),
    (GOOD | {"choices": "ab"}, "choices is text, expected a list"),
    (GOOD | {"id": True}, "id is true or false, expected text"),
    (GOOD | {"split": None}, "split is null, expected text"),
    (GOOD | {"choices": ["a"], "correct": 1}, "correct is 1, expected the index of one of 1 choi"),
    (GOOD | {"correct": "a"}, "correct is text, expected a whole number"),
    (GOOD | {"ocr": "STOP"}, "ocr is text, expected a list of texts"),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_bad_line_names_line_and_reason(folder, line, reason):
    path = write(folder, GOOD, line)
    with pytest.raises(RecordError) as error:
        read_jsonl(path)
    (problem,) = error.value.problems
    assert problem.startswith(f"{path}:2: {reason}")
    assert f"{path}: 1 bad line beside 1 good" in str(error.value)


def test_all_bad_lines_are_reported_together(folder):
    path = write(folder, GOOD, *(line for line, _ in BAD), {"answer": ""})
    with pytest.raises(RecordError) as error:
        read_jsonl(path)
    for number, (_, reason) in enumerate(BAD, start=2):
        assert f"{path}:{number}: {reason}" in str(error.value)
    last = [p for p in error.value.problems if p.startswith(f"{path}:{len(BAD) + 2}:")]
    assert len(last) == 3  # image, prompt and answer of one line


def test_not_utf8_is_a_bad_line(folder):
    path = write(folder, GOOD)
    path.write_bytes(path.read_bytes() + b'{"prompt": "\xff"}\n')
    with pytest.raises(RecordError, match=r":2: not UTF-8: invalid start byte at byte 12"):
        read_jsonl(path)


def test_byte_order_mark_is_no_part_of_the_first_line(folder):
    path = write(folder, GOOD)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_jsonl(path)) == 1


def test_id_is_used_once(folder):
    path = write(folder, GOOD | {"id": "x"}, GOOD, GOOD | {"id": "x"})
    with pytest.raises(RecordError, match=r":3: id 'x' was used on line 1"):
        read_jsonl(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file_is_an_error(folder, content):
    (folder / "data.jsonl").write_text(content)
    with pytest.raises(RecordError, match="holds no records"):
        read_jsonl(folder / "data.jsonl")


def test_what_may_be_absent_is_said_by_the_caller(folder):
    question = write(folder, {"image": "a.png", "prompt": "What?"})
    assert read_jsonl(question, need_answers=False)[0].answers == ()
    caption = write(folder, {"image": "a.png", "answer": "a cup"})
    assert read_jsonl(caption, need_prompt=False)[0].prompt == ""


def test_scan_yields_good_and_bad_lines_in_order(folder):
    path = write(folder, GOOD, "{", "", GOOD)
    lines = [(line, record is not None, len(reasons)) for line, record, reasons in scan_jsonl(path)]
    assert lines == [(1, True, 0), (2, False, 1), (4, True, 0)]


def test_missing_file_is_an_os_error(folder):
    with pytest.raises(FileNotFoundError):
        read_jsonl(folder / "none.jsonl")


def test_record_lists_all_that_is_wrong_with_it():
    with pytest.raises(RecordError) as error:
        Record("r1", (), " ", ("", 3), choices=(" ",))
    assert error.value.problems == [
        "images and prompt are empty, expected an image or a text",
        "answers[0] is empty",
        "answers[1] is int 3, expected text",
        "choices[0] is empty",
    ]
    with pytest.raises(RecordError, match=r"images is text, expected a tuple"):
        Record("r1", "a.png", "What?", ())
    with pytest.raises(RecordError, match=r"images\[0\] is int 3, expected a path"):
        Record("r1", (3,), "What?", ())
    with pytest.raises(RecordError, match=r"images\[1\] is an empty path"):
        Record("r1", (b"x", ""), "What?", ())
    with pytest.raises(RecordError, match=r"history\[0\] is \('a\?',\), expected a question and"):
        Record("r1", (b"x",), "What?", (), history=(("a?",),))
    with pytest.raises(RecordError, match=r"times has 1 numbers for 2 images"):
        Record("r1", (b"x", b"y"), "What?", (), times=(0.0,))
    Record("r1", (b"x", Image.new("L", (1, 1)), "a.png"), "", ())


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a\ud800"},
        {"id": "\udc80"},
        {"task": "\ud800"},
        {"split": "\ud800"},
        {"context": "\ud800"},
        {"answers": ("a", "\udc00")},
        {"choices": ("\udc00",)},
        {"ocr": ("a", "\udc00")},
        {"history": (("a", "\ud800"),)},
        {"images": ("\ud800.png",)},
        {"prompt": "x" * 100_001},
    ],
)
def test_texts_that_cannot_be_written_are_named(fields):
    good = Record("r", ("\udce4.png", b"x"), "what?", ("red",))  # a name of Latin-1 is a name
    assert good.text_problems() == []
    ((name, _),) = fields.items()
    (problem,) = dataclasses.replace(good, **fields).text_problems()
    assert problem.startswith(name)
    problem.encode()


def test_lines_whose_texts_cannot_be_written_are_read_to_be_counted(folder):
    path = write(folder, GOOD, GOOD | {"prompt": "\ud800"}, GOOD | {"image": "\ud800.png"})
    assert [bool(record.text_problems()) for record in read_jsonl(path)] == [False, True, True]
