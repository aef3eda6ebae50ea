"""The settings of an evaluation, with the same names as flags of `jax-instructblip evaluate`."""

import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_instructblip.data import chat_templates, images, templates, text_processors
from jax_instructblip.fields import find_problems, whole
from jax_instructblip.files import find_addresses, local_path
from jax_instructblip.models.variants import QUANTISED
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

PLACES = ("checkpoint", "data", "out", "predictions", "candidates", "relevance")  # may be addresses
_PATHS = ("out", "predictions", "candidates", "relevance")
# Ways to show records in which the paper and the released code differ, and chat templates.
SHOWING = {
    "text_processor": text_processors.PROCESSORS,
    "dialogue": templates.DIALOGUES,
    "image_crop": tuple(images.CROPS),
    "template": tuple(chat_templates.CHAT_TEMPLATES),
}
_ANSWERING = (
    *SHOWING,
    "ignore_exif",
    "checkpoint",
    "beside",
    "batch_size",
    "dtype",
    "quantise",
    "fsdp",
    "tensor",
    "no_baselines",
    *OVERRIDES,
)
_OF_DATASETS = ("candidates", "relevance", "k", "itm_only")
_OF_WAYS = ("prompt", "mode", "length_normalise")  # of datasets, and of models beside each other


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of one evaluation; None means the default of the dataset's protocol.

    Without `datasets`, accuracy is measured by family of questions: records with the same `task`.

    Attributes:
      checkpoint: a Hugging Face folder, a converted folder, a run, or the name of an embedded
        checkpoint. It, `data` and all files and folders may be object-store addresses (`gs://...`).
      beside: other checkpoints that answer the same questions, for one table of all.
      datasets: names of benchmarks; () for families.
      data: folder of prepared or original datasets; for families a JSON-lines file or `shapes`, by
        default what the run was validated on.
      out: the folder to write to; for families by default the run.
      split: a split other than the paper's; for families one or more, separated by commas, by
        default the test splits.
      limit: number of questions per dataset, always the same ones; 0: all.
      batch_size: questions, in a retrieval pairs, at once; for datasets, on each device.
      predictions: a file of existing answers to be scored.
      relevance: a file of Visual Dialog's dense annotations, for NDCG.
      no_baselines: for families, skip the baselines `blind` (black images) and `before` (training).
      text_processor, dialogue: "lavis" and "q_a" format questions and dialogues as the released
        code does, "paper" and "plain", the defaults, as in the paper (`templates.TextStyle`).
      image_crop: "squash" crops nothing; "center" crops the middle of an image, as the released
        evaluation of COCO and OK-VQA does, "clip" and "pad" as LLaVA does; by default as the
        model's own images are.
      ignore_exif: do not rotate photographs as their EXIF data say.
      prompt: with placeholders `{question} {options} {context} {ocr} {history} {answer}`.
      mode: "rank" to rank candidates, "generate" to generate answers.
      candidates: a file of candidates, one per line, for msvd_qa and msrvtt_qa.
      num_beams, length_penalty, repetition_penalty, max_new_tokens, min_new_tokens, length_rule: as
        in `GenerationConfig`.
      length_normalise: in a ranking, score by the mean log-probability per token, not the sum.
      k: in a retrieval, the number of nearest candidates that are re-ranked.
      itm_only: in a retrieval, score by the logit of the match alone.
      template: the chat template to ask the model by, a key of `CHAT_TEMPLATES`; by default its
        own.
      dtype: of weights and computation; by default bfloat16, on a CPU float32.
      quantise: form of the kernels of vision tower and language model, "int8" or "int4".
      fsdp: number of devices that split the weights, each with its own questions.
      tensor: number of devices that split the weights and share every question.
    """

    checkpoint: str | None = None
    beside: tuple[str, ...] = ()
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
    template: str | None = None
    dtype: str | None = None
    quantise: str | None = None
    fsdp: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, *, datasets: str | Sequence[str] | None = None, **values: Any) -> "Settings":
        """Returns checked settings from keyword arguments; `datasets` may be one text with commas.

        Raises:
          ValueError: an unknown setting, an invalid value, or a setting that has no effect with the
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
        values["beside"] = _places(values.get("beside"), "beside")
        if unknown := [name for name in values if name not in NAMES]:
            raise ValueError("; ".join(map(_hint, unknown)))
        settings = cls(datasets=tuple(datasets or ()), **values)
        settings.check()
        return settings

    def check(self) -> None:
        """Raises a ValueError for invalid values, and for settings that have no effect."""
        problems = [*find_addresses(vars(self), PLACES), *find_problems(self, NUMBERS)]
        if wrong := [name for name in self.datasets if not isinstance(name, str)]:
            problems.append(f"datasets has {wrong!r:.60}, expected names")
        for name in ("split", "prompt", "dtype"):
            if not isinstance(getattr(self, name), str | None):
                problems.append(f"{name} is {getattr(self, name)!r:.60}, expected text")
        if self.mode not in (None, *MODES):
            problems.append(f"mode is {self.mode!r}, expected one of {', '.join(MODES)}")
        for name, known in {**SHOWING, "quantise": QUANTISED}.items():
            if getattr(self, name) not in (None, *known):
                expected = f"expected one of {', '.join(known)}"
                problems.append(f"{name} is {getattr(self, name)!r:.60}, {expected}")
        if problems:
            raise ValueError("; ".join(problems))
        changed = {name for name in NAMES if getattr(self, name) != getattr(_DEFAULTS, name)}
        if self.datasets and self.predictions:
            wrong = changed & set(_ANSWERING)
            why = "not used with --predictions: nothing is answered, what is there is scored"
        elif self.beside and self.template:
            wrong, why = {"template"}, "not used with --beside: each model is asked by its own"
        elif self.datasets or (self.beside and self.no_baselines):
            wrong, why = changed & {"no_baselines"}, "only used without --datasets and --beside"
        else:
            wrong = changed & {*_OF_DATASETS, "predictions"}
            wrong |= set() if self.beside else changed & {*_OF_WAYS, "fsdp", "tensor"}
            why = "only used with --datasets" + " or --beside" * bool(wrong & set(_OF_WAYS))
        if wrong:
            raise ValueError(f"{', '.join(f'--{name}' for name in sorted(wrong))}: {why}")
        self._check_needed()

    def _check_needed(self) -> None:
        """Raises a ValueError if a required setting is missing."""
        lacking = [name for name in ("data", "out") if getattr(self, name) is None]
        if (self.datasets or self.beside) and lacking:
            names = " and ".join(f"--{name}" for name in lacking)
            raise ValueError(f"{names}: needed by --{'datasets' if self.datasets else 'beside'}")
        if self.checkpoint is None and not self.predictions:
            or_else = ", or --predictions of answers made before" if self.datasets else ""
            raise ValueError(f"--checkpoint: needed{or_else}")

    def showing(self) -> dict[str, Any]:
        """Returns the `Task` fields about showing records: `style`, `crop` and `upright`."""
        style = templates.TextStyle(self.text_processor or "paper", self.dialogue or "plain")
        return {"style": style, "crop": self.image_crop or "", "upright": not self.ignore_exif}

    def overrides(self) -> dict[str, Any]:
        """Returns the decoding and ranking settings that are not None, by name."""
        overrides = {name: getattr(self, name) for name in OVERRIDES}
        return {name: value for name, value in overrides.items() if value is not None}


def _places(value: Any, name: str) -> tuple[str, ...]:
    """Returns a list of paths or object-store addresses; None is an empty one."""
    if not isinstance(value, list | tuple | None):
        raise ValueError(f"{name} is {value!r:.60}, expected a list of checkpoints")
    places = (address_of(each) or local_path(each, name) for each in value or ())
    return tuple(os.fspath(each) for each in places)


NAMES = tuple(field.name for field in dataclasses.fields(Settings))
_DEFAULTS = Settings()


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(NAMES)}"
    return f"unknown setting {name!r}; {hint}"
