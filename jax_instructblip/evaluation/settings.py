"""The settings of an evaluation, named as the flags of `jax-instructblip evaluate` are."""

import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_instructblip.data import images, templates, text_processors
from jax_instructblip.fields import find_problems, whole
from jax_instructblip.files import find_addresses, local_path
from jax_instructblip.remote import address_of

DECODING = (
    *("num_beams", "length_penalty", "repetition_penalty", "max_new_tokens", "min_new_tokens"),
    "length_rule",
)
OVERRIDES = (*DECODING, "length_normalise", "k", "itm_only")
MODES = ("rank", "generate")
_DEVICES = whole(1, 1_000_000, unit="devices")
NUMBERS = {
    "batch_size": whole(1, 65_536, unit="questions", optional=True),
    "fsdp": _DEVICES,
    "k": whole(1, unit="candidates", optional=True),
    "limit": whole(0, unit="questions; 0: all"),
    "tensor": _DEVICES,
}

PLACES = ("checkpoint", "data", "out", "predictions", "candidates", "relevance")  # or addresses
_PATHS = ("out", "predictions", "candidates", "relevance")
# How records are shown, where paper and released code differ.
SHOWING = {
    "text_processor": text_processors.PROCESSORS,
    "dialogue": templates.DIALOGUES,
    "image_crop": tuple(images.CROPS),
}
_ANSWERING = (
    *SHOWING,
    "ignore_exif",
    "checkpoint",
    "batch_size",
    "dtype",
    "fsdp",
    "tensor",
    "no_baselines",
    *OVERRIDES,
)
_OF_DATASETS = ("prompt", "mode", "candidates", "relevance", "length_normalise", "k", "itm_only")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of one evaluation; of how it is asked, None is as the protocols of datasets say.

    Attributes:
      checkpoint: a Hugging Face folder, a converted one, a run, or an embedded name. It, `data` and
        the files and folders below may be at an address of a store.
      datasets: benchmarks by name; () for accuracies by family of questions.
      data: prepared datasets, or the files as they were downloaded; of families a file of JSON
        lines or `shapes`, by default what the run was validated on.
      out: folder to write to; of families by default the run.
      split: another than the paper's; of families one or more with commas, by default test splits.
      limit: so many questions of each, always the same; 0: all.
      batch_size: questions (of a retrieval pairs) at once, of datasets on each device.
      predictions: a file of answers that were made before, which are scored.
      relevance: a file of dense annotations, for visual_dialog's NDCG.
      no_baselines: of families, whether `blind` and `before` are left out.
      text_processor, dialogue: "lavis" and "q_a" write questions and dialogues as the released code
        does (`templates.TextStyle`).
      image_crop: "center" shows the middle of an image, as the released evaluation of COCO and
        OK-VQA; by default all of it, squashed.
      ignore_exif: whether photographs are left as they lie in the file.
      prompt: with placeholders `{question} {options} {context} {ocr} {history} {answer}`.
      mode: "rank" to rank candidates, "generate" to generate.
      candidates: a file of candidates, one a line, of msvd_qa and msrvtt_qa.
      num_beams, length_penalty, repetition_penalty, max_new_tokens, min_new_tokens, length_rule: as
        in `GenerationConfig`.
      length_normalise: of a ranking, whether scores are means over tokens instead of sums.
      k: of a retrieval, the nearest that are re-ranked.
      itm_only: of a retrieval, whether a score is the logit of the match alone.
      dtype: of weights and computing; by default bfloat16, on a CPU float32.
      fsdp: devices that weights are split over.
      tensor: devices that share every question.
    """

    checkpoint: str | None = None
    datasets: tuple[str, ...] = ()
    data: str | None = None
    out: Path | None = None
    split: str | None = None
    limit: int = 0
    batch_size: int | None = None
    predictions: Path | None = None
    relevance: Path | None = None
    no_baselines: bool = False
    text_processor: str | None = None
    dialogue: str | None = None
    image_crop: str | None = None
    ignore_exif: bool = False
    prompt: str | None = None
    mode: str | None = None
    candidates: Path | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    length_rule: str | None = None
    length_normalise: bool | None = None
    k: int | None = None
    itm_only: bool | None = None
    dtype: str | None = None
    fsdp: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, *, datasets: str | Sequence[str] | None = None, **values: Any) -> "Settings":
        """The settings of these values by name; datasets may stand in a text with commas.

        Raises:
          ValueError: there is no such setting, a value cannot be, or one has no effect beside the
            others.
        """
        if isinstance(datasets, str):
            datasets = [each.strip() for each in datasets.split(",")] if datasets else ()
        if not isinstance(datasets, list | tuple | None):
            raise ValueError(f"datasets is {datasets!r:.60}, expected a list of names or one text")
        for name in ("checkpoint", "data", *_PATHS):
            if values.get(name) is not None:
                path = Path(address_of(values[name]) or local_path(values[name], name))
                values[name] = (
                    path if name in _PATHS else address_of(path) or os.fspath(values[name])
                )
        if unknown := [name for name in values if name not in NAMES]:
            raise ValueError("; ".join(map(_hint, unknown)))
        settings = cls(datasets=tuple(datasets or ()), **values)
        settings.check()
        return settings

    def check(self) -> None:
        """Raises a ValueError where a setting cannot be, or the others leave it without effect."""
        problems = [*find_addresses(vars(self), PLACES), *find_problems(self, NUMBERS)]
        if wrong := [name for name in self.datasets if not isinstance(name, str)]:
            problems.append(f"datasets has {wrong!r:.60}, expected names")
        for name in ("split", "prompt", "dtype"):
            if not isinstance(getattr(self, name), str | None):
                problems.append(f"{name} is {getattr(self, name)!r:.60}, expected text")
        if self.mode not in (None, *MODES):
            problems.append(f"mode is {self.mode!r}, expected one of {', '.join(MODES)}")
        for name, known in SHOWING.items():
            if getattr(self, name) not in (None, *known):
                expected = f"expected one of {', '.join(known)}"
                problems.append(f"{name} is {getattr(self, name)!r:.60}, {expected}")
        if problems:
            raise ValueError("; ".join(problems))
        changed = {name for name in NAMES if getattr(self, name) != getattr(_DEFAULTS, name)}
        if self.datasets and self.predictions:
            wrong = changed & set(_ANSWERING)
            why = "not used with --predictions: nothing is answered, what is there is scored"
        elif self.datasets:
            wrong, why = changed & {"no_baselines"}, "only used without --datasets"
        else:
            wrong = changed & {*_OF_DATASETS, "predictions", "fsdp", "tensor"}
            why = "only used with --datasets"
        if wrong:
            raise ValueError(f"{', '.join(f'--{name}' for name in sorted(wrong))}: {why}")
        self._check_needed()

    def _check_needed(self) -> None:
        """Raises a ValueError where a setting is lacking."""
        lacking = [name for name in ("data", "out") if getattr(self, name) is None]
        if self.datasets and lacking:
            names = " and ".join(f"--{name}" for name in lacking)
            raise ValueError(f"{names}: needed by --datasets")
        if self.checkpoint is None and not self.predictions:
            or_else = ", or --predictions of answers made before" if self.datasets else ""
            raise ValueError(f"--checkpoint: needed{or_else}")

    def showing(self) -> dict[str, Any]:
        """The fields of a `Task` that say how its records are shown."""
        style = templates.TextStyle(self.text_processor or "paper", self.dialogue or "plain")
        crop = self.image_crop or "squash"
        return {"style": style, "crop": crop, "upright": not self.ignore_exif}

    def overrides(self) -> dict[str, Any]:
        """The settings of decoding and ranking that are given, by name."""
        overrides = {name: getattr(self, name) for name in OVERRIDES}
        return {name: value for name, value in overrides.items() if value is not None}


NAMES = tuple(field.name for field in dataclasses.fields(Settings))
_DEFAULTS = Settings()


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(NAMES)}"
    return f"unknown setting {name!r}; {hint}"
