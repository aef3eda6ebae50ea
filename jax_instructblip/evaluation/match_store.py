"""Results of a retrieval on disk: logits of an interrupted run, and finished candidates.

OUT/predictions/NAME.partial/matches-*.npz    logits of some images with their texts
OUT/predictions/NAME.npz                      candidates of each query, similarities, logits
"""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

KEPT_PAIRS = 65_536  # pairs in memory before they are written


class Candidates(NamedTuple):
    """The k nearest candidates of each of R queries, nearest first, with both scores.

    Attributes:
      columns: `[R, k]` int32, the numbers of the candidates.
      near: `[R, k]` float32, similarities.
      matches: `[R, k]` float32, logits of the match.
    """

    columns: np.ndarray
    near: np.ndarray
    matches: np.ndarray


class MatchStore:
    """Logits of images that were matched, which several processes may write together.

    `partial` is the folder `NAME.partial`, which exists; `process` is the index of this process.
    """

    def __init__(self, partial: Path, process: int = 0):
        self.partial, self._process = partial, process
        self._numbers: list[int] = []
        self._logits: list[np.ndarray] = []
        self._columns: list[np.ndarray] = []

    def done(self, chosen: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
        """Returns the logits of images that were matched with exactly their chosen texts.

        `chosen` has for each of all images the numbers `[n]` of its texts. The result maps the
        number of an image to its logits `[n]`.
        """
        found: dict[int, np.ndarray] = {}
        for path in sorted(self.partial.glob("matches-*.npz")):
            arrays = _read(path)
            if arrays is None or set(arrays) != {"numbers", "counts", "columns", "logits"}:
                path.unlink(missing_ok=True)  # damaged, as by a full disk
                continue
            ends = np.cumsum(arrays["counts"])[:-1]
            parts = (np.split(arrays[name], ends) for name in ("columns", "logits"))
            for number, columns, logits in zip(arrays["numbers"], *parts, strict=True):
                if number < len(chosen) and np.array_equal(columns, chosen[number]):
                    found[int(number)] = logits
        return found

    def add(self, number: int, columns: np.ndarray, logits: np.ndarray) -> None:
        """Keeps the `logits` of image `number` with the texts `columns`; now and then writes all.

        Both arrays are `[n]`.
        """
        self._numbers.append(number)
        self._columns.append(columns)
        self._logits.append(logits)
        if sum(map(len, self._logits)) >= KEPT_PAIRS:
            self.flush()

    def flush(self) -> None:
        """Writes what is kept; it is on the disk when this returns."""
        if not self._numbers:
            return
        path = self.partial / f"matches-{self._process}-{self._numbers[0]}.npz"
        arrays = {
            "numbers": np.array(self._numbers, np.int64),
            "counts": np.array([len(each) for each in self._logits], np.int64),
            "columns": np.concatenate(self._columns),
            "logits": np.concatenate(self._logits),
        }
        write_arrays(path, arrays)
        self._numbers, self._logits, self._columns = [], [], []


def write_candidates(path: Path, forth: Candidates, back: Candidates) -> None:
    """Writes the candidates of images (`forth`) and of texts (`back`)."""
    arrays = {f"forth_{name}": array for name, array in forth._asdict().items()}
    write_arrays(path, arrays | {f"back_{name}": each for name, each in back._asdict().items()})


def read_candidates(path: Path) -> tuple[Candidates, Candidates] | None:
    """Returns the candidates of images and of texts; None where the file is absent or damaged."""
    arrays = _read(path) if path.is_file() else None
    names = {way: [f"{way}_{name}" for name in Candidates._fields] for way in ("forth", "back")}
    if arrays is None or set(arrays) != {name for each in names.values() for name in each}:
        return None
    forth, back = (Candidates(*(arrays[name] for name in each)) for each in names.values())
    return forth, back


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an `.npz` file that appears whole or not at all."""
    data = io.BytesIO()
    np.savez(data, **arrays)  # pyright: ignore[reportArgumentType]
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data.getbuffer())
    temporary.replace(path)


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError):
        return None
