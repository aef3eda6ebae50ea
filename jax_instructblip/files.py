"""Reads user-supplied files safely: regular files of bounded size, UTF-8 text, strict JSON.

All JSON is read by `read_json` and `read_jsonl`. They refuse what Python's parser accepts silently
or crashes on: duplicate keys (the last would win), very deep nesting, NaN and Infinity, numbers
that overflow, and files that are too large for their kind.
"""

import dataclasses
import io
import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_instructblip.remote import address_of

MIB = 2**20

# Largest size in bytes of each kind of file; a larger one must be a mistake.
DOCUMENT_LIMIT = 64 * MIB  # configs, manifests, shard indexes: one of 10^5 tensors has 10 MiB
TOKENIZER_LIMIT = 512 * MIB  # a vocabulary of 262,144 pieces with its merges has 33 MiB
ANNOTATION_LIMIT = 8192 * MIB  # the largest file of a released dataset has 1,200 MiB
LINE_LIMIT = 16 * MIB  # one line of JSON lines; a row that ranks 10,000 candidates has 1 MiB

DEPTH_LIMIT = 100  # levels of nesting; annotations and configs have fewer than 12

KINDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
_ADDRESS = re.compile(
    r"(?:\./)*(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):(?P<slashes>/{1,2})(?P<rest>.*)"
)
_SCHEMES = frozenset(
    "abfs abfss adl az dbfs file ftp gcs gs hdfs hf http https memory oci oss r2 s3 s3a s3n sftp "
    "ssh wasb wasbs webhdfs".split()
)
_PATH_FLAGS = frozenset("candidates checkpoint config data image profile".split())
_NAMED = re.compile(r"[^/:=]+=")
_TYPES = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@dataclasses.dataclass(frozen=True)
class FileSlice:
    """A file inside another file, such as a member of a tar.

    Attributes:
      path: the outer file.
      name: the name of the member.
      offset: position of its first byte in the outer file.
      size: its size in bytes.
    """

    path: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        """Returns `PATH:NAME`, as in `raw/00000.tar:000000012.jpg`."""
        return f"{self.path}:{self.name}"

    def read(self) -> bytes:
        """Returns the bytes; raises an OSError if the outer file is missing or truncated."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{self}: {len(content)} of {self.size} bytes are there: it is cut off")
        return content


def address_problem(path: str | os.PathLike) -> str:
    """Returns an error text if `path` is a URL or address instead of a local path; else "".

    `s3:/bucket` and `./s3:/bucket` count as addresses too, since `pathlib` and shells make these of
    `s3://bucket`.
    """
    match = _ADDRESS.match(os.fspath(path))
    if match is None or not (match["scheme"].lower() in _SCHEMES or match["slashes"] == "//"):
        return ""
    scheme = match["scheme"].lower()
    address = f"{match['scheme']}://{match['rest']}"
    if scheme == "file":
        return f"is {address}: give the path alone, without {match['scheme']}://"
    if scheme in ("http", "https", "ftp"):
        return f"is {address}, an address of the web: download it and give the file's path"
    return (
        f"is {address}: this is read from a disk, or written to one; copy it there, or mount the "
        "bucket (gcsfuse, s3fs)"
    )


def path_problem(path: str | os.PathLike) -> str:
    """Returns an error text if `path` is no possible local path, or is an address; else ""."""
    text = os.fspath(path)
    if "\0" in text:
        return f"is {text!r:.80}, which cannot be the name of a file: embedded null character"
    return address_problem(path)


def local_path(path: str | os.PathLike, name: str = "the path") -> Path:
    """Returns `path` as a `Path`; a ValueError if it is empty, an address, or of another type.

    `name` is the subject of the error message.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"{name} is {path!r:.60}, expected text or a Path")
    if problem := "is empty: give a path" if path == "" else path_problem(path):
        raise ValueError(f"{name} {problem}")
    return Path(path)


def find_addresses(flags: Mapping[str, Any], stores: Sequence[str] = ()) -> list[str]:
    """Returns messages about a command's flags whose paths are addresses, empty or invalid.

    `flags` are the values by name. A flag has paths if its value is a `Path` or its name is in
    `_PATH_FLAGS`. The flags named in `stores` may have object-store addresses.
    """
    problems = []
    for flag, value in flags.items():
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, Path) or (flag in _PATH_FLAGS and isinstance(each, str)):
                text = os.fspath(each).removeprefix("@")
                if flag == "image" and _NAMED.match(text):  # NAME=FILE
                    text = text.partition("=")[2]
                if not text and flag != "profile":  # "" is the default of --profile
                    problems.append(f"{flag} is empty: give a path")
                if flag in stores and address_of(text):
                    continue
                if problem := path_problem(text):
                    problems.append(f"{flag} {problem}")
    return problems


def require_file(path: str | os.PathLike) -> os.stat_result:
    """Returns the status of a regular file, without opening it.

    Raises:
        OSError: it does not exist, or is a folder, pipe or device, which could block when opened.
        ValueError: `path` is no possible file name.
    """
    local_path(path)
    try:
        status = os.stat(path)
    except ValueError as error:  # a null character
        raise ValueError(f"{os.fspath(path)!r} cannot be the name of a file: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _TYPES if test(status.st_mode)), "no regular file")
        error = IsADirectoryError if stat.S_ISDIR(status.st_mode) else OSError
        raise error(f"{os.fspath(path)} is {kind}, expected a regular file")
    return status


def read_bytes(path: str | os.PathLike, limit: int = DOCUMENT_LIMIT) -> bytes:
    """Returns the content of a regular file of at most `limit` bytes.

    Raises:
        OSError: it is no regular file, or cannot be read.
        ValueError: it is larger.
    """
    size = require_file(path).st_size
    if size > limit:
        raise ValueError(
            f"{os.fspath(path)} has {size:,} bytes, such a file has at most {limit:,}: "
            "is it another file?"
        )
    return Path(path).read_bytes()


def decode_utf8(raw: bytes) -> str:
    """Decodes UTF-8, dropping a byte order mark; a ValueError says which byte is invalid."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        hint = " (it begins as UTF-16 does: save it as UTF-8)" if wide else ""
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}{hint}") from error


def read_text(path: str | os.PathLike, limit: int = DOCUMENT_LIMIT) -> str:
    """Reads a UTF-8 file; drops a byte order mark and turns CRLF into newlines.

    Raises:
        OSError: it is no regular file, or cannot be read.
        ValueError: it is larger than `limit` or not UTF-8; the message names the byte.
    """
    raw = read_bytes(path, limit)
    try:
        return decode_utf8(raw).replace("\r\n", "\n")
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is {error}") from error


def read_lines(path: str | os.PathLike) -> list[str]:
    """Returns the lines of a UTF-8 file, without line ends; raises like `read_text`."""
    return read_text(path).split("\n")


def read_entries(path: str | os.PathLike) -> list[str]:
    """Returns the stripped non-blank lines of a UTF-8 file; raises like `read_text`."""
    return [line.strip() for line in read_lines(path) if line.strip()]


def parse_json(raw: bytes | str, *, allow_nan: bool = False) -> Any:
    """Parses one JSON document strictly (see the module docstring).

    `allow_nan` accepts NaN and Infinity, which are not JSON but are written by Python.

    Raises:
        ValueError: the reason why it is invalid, as in "not valid JSON: nested too deeply".
    """
    text = raw if isinstance(raw, str) else decode_utf8(raw)
    numbers: dict[str, Any] = {}
    if not allow_nan:
        numbers = {"parse_constant": _refuse_constant, "parse_float": _finite}
    try:
        value = json.loads(text, object_pairs_hook=_unique, **numbers)
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # cut off Python's advice about numbers of over 4,300 digits
        raise ValueError(f"not valid JSON: {str(error).partition('; use sys.')[0]}") from error
    level = [value]
    for _ in range(DEPTH_LIMIT):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return value
    raise _too_deep()


def read_json(
    path: str | os.PathLike,
    kind: type = object,
    *,
    limit: int = DOCUMENT_LIMIT,
    allow_nan: bool = False,
) -> Any:
    """Returns the document in a JSON file, whose top level must be of type `kind`.

    `kind` is list or dict, or object for any value. `allow_nan` is as in `parse_json`.

    Raises:
        OSError: it is no regular file, or cannot be read.
        ValueError: larger than `limit`, invalid JSON, or another type; the message names the file.
    """
    raw = read_bytes(path, limit)
    try:
        document = parse_json(raw, allow_nan=allow_nan)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is {error}") from error
    if not isinstance(document, kind):
        raise ValueError(
            f"{os.fspath(path)}: found {kind_of(document)} at the top, expected {KINDS[kind]}"
        )
    return document


def scan_jsonl(
    path: str | os.PathLike, *, limit: int = LINE_LIMIT, allow_nan: bool = False
) -> Iterator[tuple[int, Any, str]]:
    """Yields (line number, value, "") of each non-blank line, or (line number, None, error).

    A line of more than `limit` bytes is an error; `allow_nan` is as in `parse_json`.

    Raises:
        OSError: it is no regular file, or cannot be read.
    """
    require_file(path)
    with Path(path).open("rb") as file:
        for number, raw in enumerate(_lines(file, limit), start=1):
            if raw is None:
                yield number, None, f"longer than {limit:,} bytes, which no line may be"
                continue
            raw = raw if number > 1 else raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
            if not raw.strip():
                continue
            try:
                yield number, parse_json(raw, allow_nan=allow_nan), ""
            except ValueError as error:
                yield number, None, str(error)


def read_jsonl(
    path: str | os.PathLike, *, limit: int = LINE_LIMIT, allow_nan: bool = False
) -> Iterator[tuple[int, Any]]:
    """Yields (line number, value) of each non-blank line; arguments are as in `scan_jsonl`.

    Raises:
        OSError: it is no regular file, or cannot be read.
        ValueError: the first invalid line, as `FILE:LINE: reason`.
    """
    for number, value, reason in scan_jsonl(path, limit=limit, allow_nan=allow_nan):
        if reason:
            raise ValueError(f"{os.fspath(path)}:{number}: {reason}")
        yield number, value


def json_line(value: Any) -> str:
    """Formats a JSON value for stdout; in ASCII if its encoding lacks a character."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return line


def kind_of(value: Any) -> str:
    """Describes a JSON value for messages: "a list", "null"; a number with its value: "int 3"."""
    if type(value) in KINDS.keys() - {int, float}:
        return KINDS[type(value)]
    return f"{type(value).__name__} {value!r}"[:80]


def _lines(file: io.BufferedReader, limit: int) -> Iterator[bytes | None]:
    """Yields the lines; None in place of a line longer than `limit` bytes."""
    while raw := file.readline(limit + 1):
        if len(raw) <= limit or raw.endswith(b"\n"):
            yield raw
            continue
        while raw and not raw.endswith(b"\n"):
            raw = file.readline(limit + 1)
        yield None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {json.dumps(key)} twice in one object")
    return fields


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number here")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _too_deep() -> ValueError:
    return ValueError(f"not valid JSON: nested too deeply, at most {DEPTH_LIMIT} levels are read")
