"""One row of the table of datasets."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping

from jax_instructblip.data.records import Record

# The 11 categories of InstructBLIP (arXiv 2305.06500).
FAMILIES = (
    "image captioning",
    "captioning with reading comprehension",
    "visual reasoning",
    "image QA",
    "knowledge-grounded image QA",
    "image QA with reading comprehension",
    "image question generation",
    "video QA",
    "visual conversational QA",
    "image classification",
    "LLaVA-Instruct-150K",
)

# Beside them, what the first two stages of BLIP-2 (arXiv 2301.12597) are trained on.
PAIRS = "image-caption pairs"

Reader = Callable[[pathlib.Path, str], Iterator[Record]]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One dataset: data, not code.

    Attributes:
      name: what configurations and folders call it.
      family: one of `FAMILIES`, or `PAIRS`.
      held_in: whether InstructBLIP was trained on it; None where it is only pre-trained on.
      read: yields the records of one split of a folder that holds the original files.
      files: for each split the annotation files that `read` needs, relative to that folder; `*.tar`
        stands for at least one tar.
      counts: expected number of records of a split, where it is known.
      templates: the list of `data/templates.py` that dresses a training prompt; "" for a dataset
        that brings its own instructions, or has none.
      licence: of annotations or images, as the source states it.
      source: where to get the files.
      notes: what is dead, differs between releases, or could not be verified.
      rerelease: files of another release (LAVIS's, if nothing else is said), which `read` takes
        where those of `files` are not there.
      shared_candidates: reads from that folder the answers that every record is ranked over; None
        where records have choices of their own, or are not ranked.
      candidate_files: the files that `shared_candidates` reads, one of them being enough.
      read_answers: yields records that can be scored but not asked, where a file that a prompt
        needs is not there; `answer_files` are the layouts that it reads.
    """

    name: str
    family: str
    held_in: bool | None
    read: Reader
    files: Mapping[str, tuple[str, ...]]
    counts: Mapping[str, int]
    templates: str
    licence: str
    source: str
    notes: str = ""
    rerelease: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    shared_candidates: Callable[[pathlib.Path], tuple[str, ...]] | None = None
    candidate_files: tuple[str, ...] = ()
    read_answers: Reader | None = None
    answer_files: tuple[Mapping[str, tuple[str, ...]], ...] = ()

    @property
    def use(self) -> str:
        """The use of the dataset, in words."""
        if self.held_in is None:
            return "pre-training"
        return "held in" if self.held_in else "held out"

    def present(self, raw: pathlib.Path) -> list[str]:
        """The splits whose annotation files, of one release or the other, are all in `raw`."""
        return self._present(raw, (self.files, self.rerelease))

    def scorable(self, raw: pathlib.Path) -> list[str]:
        """The splits that `read_answers` can read in `raw`."""
        return self._present(raw, self.answer_files)

    def _present(
        self, raw: pathlib.Path, layouts: tuple[Mapping[str, tuple[str, ...]], ...]
    ) -> list[str]:
        def there(layout: Mapping[str, tuple[str, ...]], split: str) -> bool:
            return split in layout and all(any(raw.glob(name)) for name in layout[split])

        return [split for split in self.files if any(there(each, split) for each in layouts)]
