"""`Dataset`, one row of the table of datasets.

`raw` is the folder that holds a dataset's original files and images.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

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

# The family of the datasets of BLIP-2's first two stages (arXiv 2301.12597).
PAIRS = "image-caption pairs"

Reader = Callable[[pathlib.Path, str], Iterator[Record]]
Conversations = Callable[[pathlib.Path, str, pathlib.Path], Iterator[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One dataset: how it is read, and facts about it.

    Attributes:
      name: its name in configurations and folders.
      family: the kind of task, one of `FAMILIES`, or `PAIRS`.
      held_in: True if InstructBLIP was trained on it, False if it was only evaluated, None if only
        BLIP-2 was trained on it, before it (`PAIRS`) or in a fine-tuning.
      read: function of (raw, split) that yields the records of a split.
      files: for each split the annotation files that `read` needs, relative to `raw`; `*.tar`
        is at least one tar.
      counts: expected number of records of a split, where it is known.
      templates: the key of `TEMPLATES` (`data/templates.py`) from which training prompts are made;
        "" for a dataset whose prompts are instructions already, or that has no prompts.
      licence: of annotations or images, as the source states it.
      source: where to get the files.
      notes: dead links, differences between releases, and what could not be verified.
      rerelease: for each split the files of another release (if `notes` names no other, that of
        LAVIS, InstructBLIP's official code), which `read` takes where those of `files` are missing.
      shared_candidates: function of `raw` that returns the answers over which every record is
        ranked; None where records have choices of their own, or are not ranked.
      candidate_files: the files that `shared_candidates` can read; one of them is enough.
      read_answers: like `read`, but its records can only be scored, not asked: a file that prompts
        need (with OCR words, say) may be missing.
      answer_files: one mapping for each layout that `read_answers` knows: for each split its files.
      conversations: function of (raw, split, folder) that yields the records of a split as rows of
        LLaVA's layout (`data/llava_json.py`), images relative to `folder`; None if there is no such
        form.
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
    conversations: Conversations | None = None

    @property
    def use(self) -> str:
        """The use of the dataset: "held in", "held out", "pre-training" or "fine-tuning"."""
        if self.held_in is None:
            return "pre-training" if self.family == PAIRS else "fine-tuning"
        return "held in" if self.held_in else "held out"

    def present(self, raw: pathlib.Path) -> list[str]:
        """Returns the splits that `read` can read: `raw` has all files of one release."""
        return self._present(raw, (self.files, self.rerelease))

    def scorable(self, raw: pathlib.Path) -> list[str]:
        """Returns the splits that `read_answers` can read in `raw`."""
        return self._present(raw, self.answer_files)

    def _present(
        self, raw: pathlib.Path, layouts: tuple[Mapping[str, tuple[str, ...]], ...]
    ) -> list[str]:
        def there(layout: Mapping[str, tuple[str, ...]], split: str) -> bool:
            return split in layout and all(any(raw.glob(name)) for name in layout[split])

        return [split for split in self.files if any(there(each, split) for each in layouts)]
