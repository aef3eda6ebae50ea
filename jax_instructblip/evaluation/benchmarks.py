"""Evaluates benchmarks by name: with a checkpoint, or from a file of existing answers."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jax_instructblip import remote, stores
from jax_instructblip.evaluation import retrieval_run, suite
from jax_instructblip.evaluation.blip2_protocols import RETRIEVAL
from jax_instructblip.evaluation.by_kind import get_benchmark
from jax_instructblip.evaluation.metrics.dialogue_scores import read_relevance
from jax_instructblip.evaluation.placement import choose_mesh
from jax_instructblip.evaluation.protocol import HELD_OUT, Protocol
from jax_instructblip.evaluation.settings import Settings
from jax_instructblip.evaluation.task import Task, open_task
from jax_instructblip.files import read_entries
from jax_instructblip.inference.batching import check_batch_size
from jax_instructblip.inference.digests import weights_digest
from jax_instructblip.inference.loading import (
    Source,
    describe_dtype,
    read_dtype,
    read_source,
    require_kind,
)
from jax_instructblip.inference.pipeline import READERS
from jax_instructblip.inference.pipeline import load as load_any
from jax_instructblip.inference.pipeline import load_pipeline as load
from jax_instructblip.inference.retrieval import PAIRS
from jax_instructblip.models.variants import Variant

BATCH_SIZE = 8  # questions that each device answers at once


def answer_benchmarks(settings: Settings, command: str = "") -> dict[str, Any]:
    """Answers and scores the datasets of `settings`; returns the content of `results.json`.

    `command` is recorded there. In a multi-process run every process calls it; all except process 0
    return {}.

    Raises:
      ValueError: a dataset cannot be evaluated, or the model does not fit the devices.
      OSError: there is no checkpoint, or the output folder cannot be written.
    """
    assert settings.checkpoint is not None and settings.out is not None
    with suite.agreed():
        model = Model.of(settings.checkpoint, settings)
        tasks = open_tasks(settings, model.llm, model.variant.kind)
        settings.out.mkdir(parents=True, exist_ok=True)  # fails now if it cannot be written
    blip, facts = model.load()
    run: Any = suite.run if model.llm else retrieval_run.run
    finished = run(blip, tasks, settings.out, model=facts, size=model.size, limit=settings.limit)
    return suite.finish(settings.out, finished, facts, command)


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint that is to be measured, and where its weights will lie.

    Attributes:
      checkpoint: its path or name.
      source: the checkpoint, without its weights.
      size: questions that each device takes at once; pairs for a first stage of BLIP-2.
      dtype: the name of the dtype of weights and computation.
      mesh: the devices; None for one.
      template: the chat template to ask the model by, a key of `CHAT_TEMPLATES`; None for its own.
      quantise: the form of its kernels, "int8" or "int4"; None for `dtype`.
    """

    checkpoint: str
    source: Source
    size: int
    dtype: str
    mesh: Mesh | None
    template: str | None = None
    quantise: str | None = None

    @classmethod
    def of(cls, checkpoint: str, settings: Settings) -> "Model":
        """Returns the checkpoint as `settings` place it; reads no weights.

        Raises:
          ValueError: the model does not fit the devices, or a setting is out of range.
          OSError: there is no checkpoint.
        """
        source = read_source(checkpoint)
        answers = source.variant.llm is not None
        size = settings.batch_size or (BATCH_SIZE if answers else PAIRS)
        check_batch_size(size)
        if answers:
            require_kind(source, READERS)
        dtype = read_dtype(settings.dtype).name
        form, split = settings.quantise, {"fsdp": settings.fsdp, "tensor": settings.tensor}
        mesh = choose_mesh(source.variant, dtype, quantise=form, **split)
        return cls(checkpoint, source, size, dtype, mesh, settings.template, form)

    @property
    def variant(self) -> Variant:
        """The sizes of the model."""
        return self.source.variant

    @property
    def llm(self) -> str:
        """The kind of the language model; "" for a first stage of BLIP-2, which has none."""
        return "" if self.variant.llm is None else self.variant.llm.kind

    def load(self) -> tuple[Any, dict[str, str]]:
        """Returns the loaded model, and the facts that identify it in results.

        The model is an `InstructBlipPipeline`, or the `Retriever` of a first stage of BLIP-2. The
        facts are `checkpoint`, `weights` (a digest) and `dtype`.
        """
        with suite.agreed():
            how: Any = {"template": self.template, "quantise": self.quantise}
            blip = (load if self.llm else load_any)(
                self.checkpoint, mesh=self.mesh, dtype=self.dtype, **how
            )
            blip.silent = True  # the suite shows the progress
        weights = weights_digest(self.source)
        dtype = describe_dtype(self.dtype, self.quantise)
        return blip, {"checkpoint": self.checkpoint, "weights": weights, "dtype": dtype}


def score_predictions(settings: Settings, command: str = "") -> dict[str, Any]:
    """Scores existing answers of any program (`settings.predictions`) on one dataset.

    Returns the content of `results.json`, in which `command` is recorded; needs `settings.out`.

    Raises:
      MetricError: the file has no answers, or not those of the dataset's records.
      ValueError: more than one dataset is named.
    """
    assert settings.predictions is not None and settings.out is not None
    if compared := [name for name in settings.datasets if name in RETRIEVAL]:
        raise ValueError(
            f"--predictions: {', '.join(compared)} is scored from the similarities of all pairs, "
            "not from answers: give --checkpoint of a first stage of BLIP-2"
        )
    tasks = open_tasks(settings, "t5")
    if len(tasks) != 1:
        raise ValueError(f"--predictions is of one dataset, --datasets names {len(tasks)}")
    finished = suite.score_given(tasks[0], settings.predictions)
    print("\n  ".join([suite.describe_result(finished), *finished.result["notes"]]))
    suite.keep(settings.out, finished, settings.predictions)
    model = {"predictions": str(settings.predictions)}
    return suite.finish(settings.out, [finished], model, command)


def open_tasks(settings: Settings, llm: str, kind: str = "instructblip") -> list[Task]:
    """Opens the datasets of `settings` as tasks, for a model `kind` with a language model `llm`.

    `kind` is a key of `by_kind.BY_KIND`; `llm` is a `variant.llm.kind` such as "t5", "" for a first
    stage of BLIP-2. The dataset `held_out` stands for all held-out ones of the paper's table 1.

    Raises:
      ValueError: lists unknown and unusable datasets, or settings that no dataset uses.
    """
    rows = [get_benchmark(name, kind) for name in benchmark_names(settings)]
    return open_benchmarks(settings, rows, llm)


def benchmark_names(settings: Settings) -> list[str]:
    """Returns the names of the benchmarks of `settings`, each once, with those of `held_out`."""
    names = [n for name in settings.datasets for n in (HELD_OUT if name == "held_out" else (name,))]
    return list(dict.fromkeys(names))


def open_benchmarks(settings: Settings, benchmarks: Sequence[Protocol], llm: str) -> list[Task]:
    """Opens protocols as tasks, with `settings` applied; `llm` is as in `open_tasks`.

    Raises:
      ValueError: lists unusable datasets, or settings that no dataset uses.
    """
    assert settings.data is not None
    changed = settings.overrides()
    overrides = dict(changed)
    if settings.prompt is not None:
        overrides["prompt"] = settings.prompt
    if settings.mode:
        overrides["ranking"] = settings.mode == "rank"
    candidates: tuple[str, ...] = ()
    if settings.candidates:
        candidates = tuple(read_entries(settings.candidates))
        if not candidates:
            raise ValueError(f"--candidates {settings.candidates}: it has no line with a text")
    relevance = read_relevance(settings.relevance) if settings.relevance else {}
    tasks, wrong = [], []
    for benchmark in benchmarks:
        try:
            task = open_task(
                benchmark,
                _folder(settings.data, benchmark.dataset),
                llm,
                split=settings.split or "",
                limit=settings.limit,
                candidates=candidates,
                overrides=overrides,
                scoring=settings.predictions is not None,
            )
        except (ValueError, OSError) as error:
            wrong.append(str(error))
            continue
        task = dataclasses.replace(task, **settings.showing())
        if benchmark.name == "visual_dialog":
            task = dataclasses.replace(task, relevance=relevance)
        tasks.append(task)
    if wrong:
        raise ValueError("\n  ".join([f"{len(wrong)} datasets cannot be evaluated:", *wrong]))
    _refuse_unused(tasks, changed, candidates, relevance)
    return tasks


def _folder(data: str, name: str) -> Path:
    """Returns the local folder that contains the dataset's folder `name`.

    If `data` is an object-store address, this dataset (or all) is downloaded first.
    """
    address = remote.address_of(data)
    if address and name in remote.names(address):
        return stores.input_path(f"{address}/{name}").parent
    return stores.input_path(data)


def _refuse_unused(
    tasks: Sequence[Task],
    changed: Mapping[str, Any],
    candidates: tuple[str, ...],
    relevance: Mapping[str, Any],
) -> None:
    """Raises a ValueError if a setting has no effect on any of the tasks."""
    used = {name for task in tasks for name in task.settings}
    wrong = [name for name in changed if name not in used]
    if candidates and not any(task.candidates for task in tasks):
        wrong.append("candidates")
    if relevance and not any(task.relevance for task in tasks):
        wrong.append("relevance")
    if wrong:
        names = ", ".join(task.name for task in tasks)
        raise ValueError(f"{', '.join(f'--{each}' for each in wrong)}: not used by {names}")
