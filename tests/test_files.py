"""Users' files: which are refused, with which messages, and that reading never blocks."""

import ast
import json
import os
import socket
from pathlib import Path

import pytest

from jax_instructblip import atomic, files
from jax_instructblip.files import (
    DEPTH_LIMIT,
    address_problem,
    find_addresses,
    local_path,
    parse_json,
    read_bytes,
    read_json,
    read_jsonl,
    read_lines,
    read_text,
    require_file,
    scan_jsonl,
)

PACKAGE = Path(files.__file__).parent
# Texts of libraries.
NO_FILES = {"data/piece_encoder.py", "backbones/tokenizers.py", "training/loop.py"}


def deep(levels: int, left: str = "[", right: str = "]") -> str:
    return left * levels + right * levels


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"answer": 1, "answer": 1}', 'not valid JSON: key "answer" twice in one object'),
        ('[{"a": {"b": 1, "c": 2, "b": 3}}]', 'key "b" twice'),
        ('{"a": 1, "\\u0061": 2}', 'key "a" twice'),
        (deep(DEPTH_LIMIT + 1), "nested too deeply, at most 100 levels"),
        (deep(500), "nested too deeply"),
        (deep(DEPTH_LIMIT + 1, '{"a":', "}").replace(":}", ":1}"), "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("NaN", "NaN is no number here"),
        ('{"a": [-Infinity]}', "-Infinity is no number here"),
        ("1e999", "the number 1e999 is too large"),
        ("[-1.5e400]", "the number -1.5e400 is too large"),
        ("9" * 5000, "not valid JSON: Exceeds the limit"),
        ("", "not valid JSON: Expecting value: line 1 column 1"),
        ("{'a': 1}", "not valid JSON: Expecting property name"),
        ('{"a": 1} x', "not valid JSON: Extra data"),
        (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 7"),
        ("{}".encode("utf-16"), "at byte 0 (it begins as UTF-16 does: save it as UTF-8)"),
    ],
)
def test_what_is_no_json_here(text, reason):
    with pytest.raises(ValueError) as error:
        parse_json(text)
    assert reason in str(error.value)
    assert len(str(error.value)) < 200


def test_json_is_read_as_it_was_written():
    value = {"a": [1, -2.5, None, True, "ü\u2028"], "b": {"a": {}}}
    assert parse_json(json.dumps(value)) == value
    assert parse_json(("\ufeff" + json.dumps(value, ensure_ascii=False)).encode()) == value
    assert parse_json(deep(DEPTH_LIMIT)) == json.loads(deep(DEPTH_LIMIT))
    assert parse_json("[NaN, -Infinity]", allow_nan=True)[1] == float("-inf")


def test_json_file_of_another_kind_or_size_is_refused_by_name(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[1, 2]")
    assert read_json(path) == [1, 2]
    with pytest.raises(ValueError, match="config.json: found a list at the top, expected an obj"):
        read_json(path, dict)
    with pytest.raises(ValueError, match="config.json has 6 bytes, such a file has at most 5"):
        read_json(path, limit=5)
    path.write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON: Expecting property"):
        read_json(path)


def test_lines_that_cannot_be_read_are_told_apart_from_good_ones(tmp_path):
    path = tmp_path / "own.jsonl"
    good, long = b'{"a": 1}', b'"' + b"x" * 60 + b'"'
    path.write_bytes(
        b"\xef\xbb\xbf"
        + b"\n".join([good, b"  ", b'{"a": 1, "a": 2}', b"\xff", long, long * 3, good + b"\r"])
    )
    assert list(scan_jsonl(path, limit=62)) == [
        (1, {"a": 1}, ""),
        (3, None, 'not valid JSON: key "a" twice in one object'),
        (4, None, "not UTF-8: invalid start byte at byte 0"),
        (5, "x" * 60, ""),
        (6, None, "longer than 62 bytes, which no line may be"),
        (7, {"a": 1}, ""),
    ]
    with pytest.raises(ValueError, match=r'own.jsonl:3: not valid JSON: key "a" twice'):
        list(read_jsonl(path))


def test_a_file_without_line_breaks_is_not_read_whole(tmp_path):
    path = tmp_path / "own.jsonl"
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole, which takes no room
        file.seek(0)
        file.write(b'{"a": 1}\n')
    rows = scan_jsonl(path)
    assert next(rows) == (1, {"a": 1}, "")
    with pytest.raises(ValueError, match="has 1,099,511,627,776 bytes, such a file has at most"):
        read_bytes(path)


@pytest.mark.parametrize("read", [read_bytes, read_text, read_json, read_lines, scan_jsonl])
def test_what_is_no_regular_file_is_refused_and_never_blocks(tmp_path, read):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, message in [
        ("fifo", "fifo is a pipe, expected a regular file"),
        ("link", "link is a pipe, expected a regular file"),
        ("/dev/zero", "/dev/zero is a device, expected a regular file"),
        (".", "is a folder, expected a regular file"),
        ("dangling", "No such file"),
        ("none", "No such file"),
        ("x" * 5000, "too long"),
    ]:
        with pytest.raises(OSError, match=message):
            list(read(tmp_path / name))
    with pytest.raises(ValueError, match="cannot be the name of a file: embedded null"):
        list(read(tmp_path / "a\0b"))


def test_a_socket_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(OSError, match="socket is a socket, expected a regular file"):
            require_file("socket")


def test_lines_of_a_text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeffa dog\r\n\r\nzwei Hünde\n".encode())
    assert read_lines(path) == ["a dog", "", "zwei Hünde", ""]
    path.write_bytes(b"a dog\n\xff\n")
    with pytest.raises(ValueError, match="words.txt is not UTF-8: .* at byte 6"):
        read_lines(path)


def test_json_is_read_here_alone():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.loads", "json.load"):
                # A value is made plain by writing and reading it.
                if not ast.unparse(node.args[0]).startswith("json.dumps("):
                    found.add(path.relative_to(PACKAGE).as_posix())
    assert found - NO_FILES == {"files.py"}


def test_the_recorded_cases(shared):
    cases = shared / "data" / "cases"
    if not cases.is_dir():
        pytest.skip("shared/data/cases is not there")
    with pytest.raises(ValueError, match="deep.json is not valid JSON: nested too deeply"):
        read_json(cases / "deep.json")
    with pytest.raises(ValueError, match=r'duplicate_keys.jsonl:1: .*key "answer" twice'):
        list(read_jsonl(cases / "duplicate_keys.jsonl"))
    lines = scan_jsonl(cases / "metrics_damaged.jsonl")
    assert [line for line, _, reason in lines if reason] == [2, 4]


@pytest.mark.parametrize(
    "path, problem",
    [
        ("runs/mine", ""),
        ("/tmp/a:b/c", ""),
        ("C:/models", ""),
        ("./a//b", ""),
        ("notes: a/b", ""),
        ("step:/x", ""),  # no store that is known
        ("s3://b/x", "is s3://b/x: this is read from a disk, or written to one"),
        ("./s3:/b/x", "is s3://b/x: this is read from a disk"),
        (Path("s3://b/x"), "is s3://b/x: this is read from a disk"),
        ("././gs://b", "is gs://b: this is read"),
        ("S3://b", "is S3://b: this is read"),
        ("memory://a", "is memory://a: this is read"),
        ("nowhere://a", "is nowhere://a: this is read"),
        ("hf://datasets/a", "is hf://datasets/a: this is read"),
        ("https://a.org/b.jpg", "is https://a.org/b.jpg, an address of the web: download it"),
        ("file:///a/b", "is file:///a/b: give the path alone"),
    ],
)
def test_what_is_an_address_and_no_path(path, problem):
    assert address_problem(path).startswith(problem)
    if problem:
        with pytest.raises(ValueError, match="the run is "):
            local_path(path, "the run")
    else:
        assert local_path(path) == Path(path)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (
            "a\0b",
            "the run is 'a\\x00b', which cannot be the name of a file: embedded null character",
        ),
        ("", "the run is empty: give a path"),
        (None, "the run is None, expected text or a Path"),
        (b"a", "the run is b'a', expected text or a Path"),
        (5, "the run is 5, expected text or a Path"),
    ],
)
def test_what_cannot_be_a_path_is_refused(path, said):
    with pytest.raises(ValueError) as error:
        local_path(path, "the run")
    assert str(error.value) == said


def test_a_null_character_is_no_part_of_a_path_anywhere():
    said = "'a\\x00b', which cannot be the name of a file: embedded null character"
    assert find_addresses({"out": Path("a\0b"), "data": "a\0b"}) == [
        f"out is {said}",
        f"data is {said}",
    ]
    assert atomic.unwritable("a\0b") == f"it is {said}"


def test_an_empty_path_is_not_the_present_folder():
    flags = {"checkpoint": "", "image": ["a.png", ""], "profile": "", "prompt": ""}
    said = "is empty: give a path"
    assert find_addresses(flags) == [f"checkpoint {said}", f"image {said}"]


def test_every_address_among_flags_is_named():
    flags = {
        "out": Path("s3://b/x"),
        "checkpoint": "gs://c",
        "compare": [Path("a"), Path("gs://d")],
    }
    flags |= {"prompt": "what is https://x?", "limit": 3, "data": None, "image": ["a=https://e/f"]}
    found = [problem.split(" is ")[0] for problem in find_addresses(flags)]
    assert found == ["out", "checkpoint", "compare", "image"]
    assert find_addresses({"prompt": "s3://b", "candidates": "s3,gs", "image": ["a=b/c.png"]}) == []


def test_nothing_is_read_from_or_written_to_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: read_json("s3://b/x.json"),
        lambda: list(scan_jsonl(Path("s3://b/x.jsonl"))),
        lambda: atomic.write_file(Path("s3://b/x"), ""),
        lambda: atomic.atomic_folder("gs://b/x").__enter__(),
        lambda: atomic.refuse_existing(Path("gs://b/x")),
    ):
        with pytest.raises(ValueError, match="is (s3|gs)://b/x.*: this is read from a disk"):
            call()
    assert "it is gs://b" in atomic.unwritable("gs://b")
    assert list(tmp_path.iterdir()) == []
