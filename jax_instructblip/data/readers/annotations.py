"""Functions that read annotation files, with errors that name file, row and field.

Rows are dicts. The argument `where` is text for error messages, such as `FILE:LINE`; `raw` is the
folder that holds a dataset's original files. A bad file or row raises an `AnnotationError`.
"""

import contextlib
import csv
import io
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jax_instructblip import files
from jax_instructblip.data.records import Record

Layout = Mapping[str, tuple[str, ...]]  # split -> files that it needs


class AnnotationError(ValueError):
    """An annotation file is missing, is of another release, or has a row that cannot be used."""


def read_text(path: pathlib.Path) -> str:
    """Returns the text of a UTF-8 file without byte order mark; all line ends become newlines."""
    with _annotation(path):
        return files.read_text(path, files.ANNOTATION_LIMIT)


def read_json(path: pathlib.Path, kind: type = object) -> Any:
    """Returns the document in a JSON file; `kind` (list or dict) is what its top level must be."""
    with _annotation(path):
        document = files.read_json(path, limit=files.ANNOTATION_LIMIT)
    if not isinstance(document, kind):
        raise AnnotationError(
            f"{path}: found {_kind(document)} at the top, expected {files.KINDS[kind]}: "
            "is it another release of the file?"
        )
    return document


def read_json_lines(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (`FILE:LINE`, object) for each line that is not blank."""
    with _annotation(path):
        for number, row in files.read_jsonl(path):
            where = f"{path}:{number}"
            yield where, require(row, dict, where)


@contextlib.contextmanager
def _annotation(path: pathlib.Path) -> Iterator[None]:
    """Turns errors about the file `path` into an AnnotationError that says what to do."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AnnotationError(
            f"{path} does not exist: `jax-instructblip prepare --list` says where to get it"
        ) from error
    except AnnotationError:
        raise
    except ValueError as error:
        raise AnnotationError(f"{error}; it may be damaged or cut off: get it again") from error


def read_lines(path: pathlib.Path) -> list[str]:
    """Returns the lines of a text file; only newlines end a line, not form feeds and the like."""
    return read_text(path).rstrip("\n").split("\n")


def read_csv(path: pathlib.Path, columns: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (`FILE:LINE`, row) of a CSV file with a header, which must have `columns`.

    A quoted cell may hold line breaks; LINE is the first line of the row.
    """
    # The parser splits lines itself, since quoted cells may hold newlines.
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    number = 1
    try:
        names = list(reader.fieldnames or ())
        if missing := sorted(set(columns) - set(names)):
            raise AnnotationError(
                f"{path}: no columns {', '.join(missing)}; found {', '.join(names) or 'none'}"
            )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise AnnotationError(f"{path}: columns {', '.join(map(repr, twice))} are there twice")
        number = reader.line_num + 1
        for row in reader:
            where = f"{path}:{number}"
            if reader.restkey in row:
                raise AnnotationError(
                    f"{where}: {len(names) + len(row[reader.restkey])} cells, expected "
                    f"{len(names)}: a comma inside of a cell needs quotes around the cell"
                )
            yield where, row
            number = reader.line_num + 1
    except csv.Error as error:
        raise AnnotationError(
            f"{path}:{number}: the row that begins here is no CSV: {error}; correct the quotes"
        ) from error


def field(row: dict[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Returns `row[name]`, which must be of type `kind` (str, int, float, list, dict).

    Raises:
        AnnotationError: the field is missing or of another type; the message begins with `where`.
    """
    if name not in row:
        raise AnnotationError(
            f"{where}: no field {name!r}; found {', '.join(map(str, row)) or 'none'}: "
            "is it another release of the file?"
        )
    return require(row[name], kind, f"{where}: {name}")


def require(value: Any, kind: type | tuple[type, ...], where: str) -> Any:
    """Returns `value`, which must be of type `kind`, else an error; a bool is no number."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(files.KINDS[each] for each in kinds)
        raise AnnotationError(f"{where}: found {_kind(value)}, expected {expected}")
    return value


def inside(raw: pathlib.Path, *parts: str, where: str = "") -> str:
    """Returns the path `raw/parts[0]/parts[1]/...`; one that leads out of `raw` is an error."""
    path = pathlib.PurePosixPath(*parts)
    if path.is_absolute() or ".." in path.parts:
        raise AnnotationError(f"{where or raw}: the path {str(path)!r} leads out of the folder")
    return str(raw / path)


def pick_layout(raw: pathlib.Path, split: str, *layouts: Layout) -> tuple[int, list[pathlib.Path]]:
    """Returns (number, paths) of the first layout whose files for this split are all in `raw`.

    A layout is one way in which a dataset was released: for each split the files that it needs. A
    name may be a pattern (`*.tar`) that at least one file must match.
    """
    known = sorted(set().union(*layouts))
    if split not in known:
        raise AnnotationError(f"split {split!r} is not known, expected one of {', '.join(known)}")
    missing = []
    for number, layout in enumerate(layouts):
        if split not in layout:
            continue
        absent = [name for name in layout[split] if not any(raw.glob(name))]
        if not absent:
            return number, [raw / name for name in layout[split]]
        missing.append(" and ".join(absent))
    raise AnnotationError(
        f"{raw} lacks files of split {split!r}: {', or else '.join(missing)}: "
        "`jax-instructblip prepare --list` says where to get it"
    )


def text_of(row: dict[str, Any], name: str, where: str) -> str:
    """Returns `row[name]`, a text that must not be blank, without white space around it."""
    text = field(row, name, str, where).strip()
    if not text:
        raise AnnotationError(f"{where}: {name} is blank: correct the row or delete it")
    return text


def texts_of(row: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    """Returns `row[name]`, a list of texts, without the blank ones; at least one must be left.

    Official files hold answers that an annotator left blank (A-OKVQA val has one).
    """
    texts = field(row, name, list, where)
    for index, text in enumerate(texts):
        require(text, str, f"{where}: {name}[{index}]")
    kept = tuple(text for text in texts if text.strip())
    if not kept:
        raise AnnotationError(
            f"{where}: {name} holds {'only blank texts' if texts else 'nothing'}, expected at "
            "least one text: correct the row or delete it"
        )
    return kept


def annotated(
    row: dict[str, Any], name: str, where: str, *, hidden: bool = False
) -> dict[str, Any]:
    """Returns a dict of the fields `answers` and `blank` of a `Record`.

    They are the texts in the list `row[name]` that are not blank, and the number of the blank ones.
    With `hidden` (the answers of a test set are not public) there are no answers, and the row is
    not read.
    """
    if hidden:
        return {"answers": (), "blank": 0}
    texts = texts_of(row, name, where)
    return {"answers": texts, "blank": len(row[name]) - len(texts)}


def unique(records: Iterable[Record]) -> Iterator[Record]:
    """Yields the records; an AnnotationError if two have the same id."""
    seen: dict[str, int] = {}
    for number, record in enumerate(records):
        before = seen.setdefault(record.id, number)
        if before != number:
            raise AnnotationError(
                f"id {record.id!r} of {record.task} {record.split} is used twice: by records "
                f"{before} and {number}"
            )
        yield record


def _kind(value: Any) -> str:
    return files.KINDS.get(type(value), repr(value)[:40])
