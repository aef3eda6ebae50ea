"""Image-caption pairs in tars, as img2dataset writes them (WebDataset), with random access.

    00000.tar: 000000000.jpg, 000000000.json, 000000000.txt, 000000001.jpg ...
    00000_stats.json: {"successes": 8123, ...}, the number of entries written to 00000.tar

    folder --the headers of each tar, once--> index: a row per entry --records[i]--> Record

Consecutive members with the same key are an entry: an image, and its caption, which is the field
`caption` of the .json (a text, or a list of texts of which training draws one) or else the .txt.
An entry that is not such a pair, and each entry that a truncated tar has lost, is a record with a
`problem`: `prepare` leaves it out, counts it and names it; training takes another record instead.

The index is kept in the folder of copies (`stores.py`). A tar whose size or time of change differs
is read again.
"""

import bisect
import concurrent.futures
import hashlib
import itertools
import os
import pathlib
import posixpath
import tarfile
from typing import Any, NamedTuple

import numpy as np

from jax_instructblip import files, stores
from jax_instructblip.atomic import locked
from jax_instructblip.data.readers.named_files import PICTURES
from jax_instructblip.data.records import Record
from jax_instructblip.files import FileSlice
from jax_instructblip.progress import Progress

TARS = "*.tar"
THREADS = 8  # threads that read headers; on a network disk each of them waits most of the time
_ABSENT = -1  # the offset of a missing member


class _Row(NamedTuple):
    """A row of the index: one entry, with offsets and sizes (bytes) of its members in the tar."""

    key: bytes
    problem: bytes = b""
    ending: bytes = b""  # file name extension of the image, as in `.jpg`
    image: int = _ABSENT
    image_size: int = 0
    json: int = _ABSENT
    json_size: int = 0
    text: int = _ABSENT
    text_size: int = 0


class TarRecords:
    """Random access to the pairs of a folder of tars, ordered by tar and by position in the tar.

    An entry that is no pair has its place, too: its record has a `problem`.
    """

    def __init__(
        self, tars: list[tuple[pathlib.Path, pathlib.Path]], *, task: str = "", split: str = ""
    ):
        """Opens the indexes; `tars` has for each tar its path and the path of its index."""
        self._tars, self._task, self._split = tars, task, split
        self._maps: dict[int, np.ndarray] = {}
        self._ends = list(itertools.accumulate(len(self._rows(n)) for n in range(len(tars))))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        """Returns the record at `index`, with a `problem` if it is not a pair."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}: {self!r}")
        number = bisect.bisect_right(self._ends, index)
        row = self._rows(number)[index - (self._ends[number - 1] if number else 0)]
        tar, key = self._tars[number][0], _text(row["key"])
        member = lambda ending, offset, size: FileSlice(str(tar), key + ending, offset, size)
        captions, problem = (), _text(row["problem"])
        if not problem:
            sidecars = {
                name: member(f".{name}", int(row[name]), int(row[f"{name}_size"]))
                for name in ("json", "text")
                if row[name] != _ABSENT
            }
            try:
                captions = _captions(**sidecars)
            except (OSError, ValueError) as error:
                problem = str(error)
        return Record(
            id=f"{tar.stem}/{key}",
            images=(
                member(_text(row["ending"]), max(int(row["image"]), 0), int(row["image_size"])),
            ),
            prompt="",
            answers=captions,
            task=self._task,
            split=self._split,
            problem=problem,
        )

    def hopeless(self) -> str:
        """Returns key and problem of the first entry if no entry is a pair; else ""."""
        tables = [self._rows(number) for number in range(len(self._tars))]
        if any((table["problem"] == b"").any() for table in tables):
            return ""
        first = next(table for table in tables if len(table))[0]
        return f"{_text(first['key'])}: {_text(first['problem'])}"

    def digest(self) -> str:
        """Returns a sha256 of the names of the tars and the rows of their indexes."""
        digest = hashlib.sha256()
        for number, (tar, _) in enumerate(self._tars):
            digest.update(tar.name.encode(errors="surrogateescape"))
            digest.update(np.ascontiguousarray(self._rows(number)).tobytes())
        return digest.hexdigest()

    def _rows(self, number: int) -> np.ndarray:
        """Returns the index of one tar, memory-mapped, so that processes share it."""
        if number not in self._maps:
            self._maps[number] = np.load(self._tars[number][1], mmap_mode="r")
        return self._maps[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __repr__(self) -> str:
        """Names the folder and the split; Grain tells sources apart by it."""
        return f"TarRecords({self._tars[0][0].parent}:{self._split})"


def holds_tars(path: pathlib.Path) -> bool:
    """Returns True for a tar and for a folder that has tars."""
    return path.suffix == ".tar" if path.is_file() else any(path.glob(TARS))


def open_tars(path: str | os.PathLike[str], *, task: str = "", split: str = "") -> TarRecords:
    """Returns the pairs of one tar or of all tars of a folder; reads the headers of new tars first.

    Every record gets `task` and `split` as its fields of these names.

    Raises:
        FileNotFoundError: there is no tar.
        ValueError: no entry is an image with a caption, or a `_stats.json` is damaged.
    """
    path = pathlib.Path(path).absolute()
    tars = sorted(path.glob(TARS)) if path.is_dir() else [path]
    if not tars:
        raise FileNotFoundError(f"{path} has no {TARS}")
    home = stores.working_folder(os.fspath(tars[0].parent))
    with (
        locked(home / "lock"),
        Progress(len(tars), f"reading headers of {path}", "tars") as line,
        concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
    ):
        indexes = []
        for index in pool.map(lambda tar: _index(tar, home), tars):
            indexes.append(index)
            line.update()
    records = TarRecords(list(zip(tars, indexes, strict=True)), task=task, split=split)
    if not len(records):
        raise ValueError(f"{path}: no entry in {len(tars)} tars; expected KEY.jpg and KEY.txt")
    if reason := records.hopeless():
        raise ValueError(
            f"{path}: no entry of {len(tars)} tars is a pair, KEY.jpg followed by KEY.txt or "
            f"KEY.json; the first: {reason}"
        )
    return records


def _index(tar: pathlib.Path, home: pathlib.Path) -> pathlib.Path:
    """Returns the path of the index of a tar; writes it first if it is absent."""
    status, expected = files.require_file(tar), _expected(tar)
    name = f"{status.st_size}-{status.st_mtime_ns}-{expected}.npy"
    path = home / tar.name / name
    if path.is_file() and _is_index(path):
        return path
    path.parent.mkdir(exist_ok=True)
    for other in path.parent.iterdir():  # of an older state of the tar, or of a killed run
        other.unlink()
    temporary = path.with_name("rows.tmp")
    with temporary.open("wb") as file:
        np.save(file, scan_tar(tar, expected), allow_pickle=False)
    temporary.replace(path)
    return path


def _is_index(path: pathlib.Path) -> bool:
    """Tells whether a file can be read as an index; one that a power cut emptied cannot."""
    try:
        return np.load(path, mmap_mode="r").dtype.names == _Row._fields
    except (ValueError, EOFError, OSError):
        return False


def _expected(tar: pathlib.Path) -> int:
    """Returns the number of entries in the `_stats.json` of a tar; -1 without such a file."""
    path = tar.with_name(f"{tar.stem}_stats.json")
    if not path.is_file():
        return -1
    count = files.read_json(path, dict).get("successes", -1)
    return count if isinstance(count, int) else -1


def scan_tar(tar: pathlib.Path, expected: int = -1) -> np.ndarray:
    """Returns the index of a tar: a structured array with one row per entry, in order.

    The fields are an entry's `key` and `problem`, the `ending` of its image's name, and the offsets
    and sizes (bytes) of its members. Only headers are read. If the tar is truncated, or has fewer
    entries than `expected` (-1: unknown), each lost entry has a row with a `problem`; a loss of
    unknown size has one row.
    """
    members, reason = _members(tar)
    rows: list[_Row] = []
    seen: set[str] = set()
    for key, group in itertools.groupby(members, key=lambda each: _split(each.name)[0]):
        if key:
            rows.append(_row(key, list(group), again=key in seen))
            seen.add(key)
    if reason:
        if rows and rows[-1].problem:  # the entry in which the tar ends
            rows.pop()
        reason = f"{tar.name} is damaged or cut off after {len(rows)} entries ({reason})"
    lost = max(expected - len(rows), 0)
    if reason and expected == -1:
        lost, reason = 1, f"{reason}; how many it lacks is not known"
    if lost:
        reason = reason or f"{tar.name} has {len(rows)} entries"
        reason += f", {expected} were written" * (expected != -1) + ": get it again"
        problem = reason.encode(errors="surrogateescape")
        rows += [_Row(b"lost-%d" % (n + 1), problem) for n in range(lost)]
    return _table(rows)


def _members(tar: pathlib.Path) -> tuple[list[tarfile.TarInfo], str]:
    """Returns the files in a tar, and the reason if it ends before its end-of-archive mark.

    `tarfile` itself reports no error at a damaged or truncated header; it just stops there.
    """
    members: list[tarfile.TarInfo] = []
    size = files.require_file(tar).st_size
    try:
        with tar.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                if member.offset_data + member.size > size:
                    return members, f"it ends in {member.name}"
                if member.isreg() and not member.issparse():
                    members.append(member)
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                return members, f"no header and no end mark at byte {archive.offset}"
    except tarfile.TarError as error:
        return members, str(error)
    return members, ""


def _split(name: str) -> tuple[str, str]:
    """Splits `a/000.seg.png` into key `a/000` and extension `.seg.png`; hidden files: key ""."""
    folder, _, file = name.removeprefix("./").rpartition("/")
    stem, dot, ending = file.partition(".")
    return posixpath.join(folder, stem) if stem else "", dot + ending.lower()


def _row(key: str, members: list[tarfile.TarInfo], again: bool) -> _Row:
    """Returns the row of an entry, with a `problem` if it is not a pair.

    `again` tells that an earlier entry of the tar has the same key.
    """
    endings = [_split(member.name)[1] for member in members]
    places = dict(zip(endings, members, strict=True))
    pictures = [ending for ending in endings if ending in PICTURES]
    problem = ""
    if again:
        problem = "its key is used before in the tar"
    elif len(pictures) != 1:
        kind = f"{len(pictures)} images" if pictures else "no image"
        problem = f"{kind} among its files ({', '.join(endings)}), expected one"
    elif len(places) < len(members):
        problem = f"a file twice ({', '.join(endings)})"
    elif not {".json", ".txt"} & places.keys():
        problem = "no caption: neither .json nor .txt"
    row: dict[str, Any] = {}
    for name, ending in (
        ("image", pictures[0] if pictures else ""),
        ("json", ".json"),
        ("text", ".txt"),
    ):
        if ending in places:
            row |= {name: places[ending].offset_data, f"{name}_size": places[ending].size}
    encode = lambda text: text.encode(errors="surrogateescape")
    return _Row(encode(key), encode(problem), encode(pictures[0] if pictures else ""), **row)


def _table(rows: list[_Row]) -> np.ndarray:
    """Returns the rows as a structured array; text fields are as wide as their longest text."""
    columns = list(zip(*rows, strict=True)) or [()] * len(_Row._fields)
    texts = {"key", "problem", "ending"}
    kinds = [
        (name, f"S{max(map(len, column), default=0) or 1}" if name in texts else np.int64)
        for name, column in zip(_Row._fields, columns, strict=True)
    ]
    return np.array([tuple(row) for row in rows], kinds)


def _captions(json: FileSlice | None = None, text: FileSlice | None = None) -> tuple[str, ...]:
    """Returns the captions of an entry; raises a ValueError with the reason if there are none."""
    said: Any = None
    if json is not None:
        try:
            # img2dataset copies columns of its input, in which NaN occurs.
            fields = files.parse_json(json.read(), allow_nan=True)
        except ValueError as error:
            raise ValueError(f"its .json is {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"its .json is {files.kind_of(fields)}, expected an object")
        said = fields.get("caption")
        if not (said is None or _is_texts(said)):
            kind = files.kind_of(said)
            raise ValueError(f"caption in its .json is {kind}, expected text or a list of texts")
    if said is None and text is not None:
        try:
            said = files.decode_utf8(text.read())
        except ValueError as error:
            raise ValueError(f"its .txt is {error}") from error
    captions = [said] if isinstance(said, str) else said or []
    kept = tuple(caption.strip() for caption in captions if caption.strip())
    if not kept:
        raise ValueError("its caption is blank" if captions else "no caption in its .json or .txt")
    return kept


def _is_texts(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(each, str) for each in value)
    )


def _text(value: Any) -> str:
    return bytes(value).decode(errors="surrogateescape")
