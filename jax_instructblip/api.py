"""The entry points that need both training and evaluation: `train` and `evaluate`."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from jax_instructblip import stores
from jax_instructblip.evaluation import benchmarks, validation
from jax_instructblip.evaluation.family_accuracies import TunedRun, measure_families
from jax_instructblip.evaluation.reports import curves
from jax_instructblip.evaluation.settings import Settings
from jax_instructblip.remote import address_of, is_remote
from jax_instructblip.training import loop, setup
from jax_instructblip.training.config_fields import check_config
from jax_instructblip.training.config_file import change_fields, load_config
from jax_instructblip.training.earlier_run import read_run
from jax_instructblip.training.initial import load_untuned
from jax_instructblip.training.metrics import read_answers, read_metrics

Joined = contextlib.AbstractContextManager[Any]


def train(
    config: ConfigDict | str | os.PathLike,
    overrides: Mapping[str, Any] | None = None,
    *,
    fresh: bool = False,
    joined: Joined | None = None,
) -> str:
    """Tunes the Q-Former, or other parts, as a config says; takes up a run that is there.

    Ctrl-C or SIGTERM saves and ends. What is going on is told on stderr.

    Args:
      config: the fields of `configs/common.py`, or the path of a file whose `get_config()` returns
        them.
      overrides: other values of some fields, by dotted names: `{"train.steps": 100}`.
      fresh: whether it starts over where an earlier run has left metrics and its checkpoints are
        gone.
      joined: makes this process one of several while the run goes on (`parallel.cluster.joined`);
        entered when the config is known to be right.

    Returns:
      The run directory, `config.workdir`, which `load`, `evaluate`, `export` and `merge` take.

    Raises:
      ValueError: a field is unknown or cannot be so, data cannot be used, a checkpoint is of
        another run, or the loss is no longer finite.
      OSError: a file cannot be read, or a checkpoint not be written.
    """
    if not isinstance(config, ConfigDict):
        config = load_config(config)
    if overrides:
        config = change_fields(config, overrides)
    check_config(config, run=True)  # before the records to validate on are read, or drawn
    if (records := setup.read_validation_records(config)) is not None:
        validation.check(records, config.validation.path, config.validation.split)
    with joined or contextlib.nullcontext():
        return loop.run(config, evaluate=validation.evaluate, report=curves.write, fresh=fresh)


def evaluate(
    checkpoint: str | os.PathLike | None = None,
    datasets: str | Sequence[str] | None = None,
    data: str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    *,
    joined: Joined | None = None,
    command: str = "",
    **settings: Any,
) -> dict[str, Any]:
    """Measures a model on benchmarks beside the paper's numbers, or by family of questions.

    Prints the results. Answers that are in `out` already are not given again.

    Args:
      checkpoint: a Hugging Face folder, a converted one, a run, or an embedded name. It, `data`,
        `out` and the files of other settings may be addresses (`gs://bucket/run`).
      datasets: benchmarks, as a list or a text with commas; "held_out" is all of the paper's table
        1. Without any, exact match is counted by family of questions.
      data: what `jax-instructblip prepare` wrote, or the files as they were downloaded; of families
        a file of JSON lines or `shapes`, by default what the run was validated on.
      out: folder to write to; of families by default the run.
      joined: makes this process one of several that share the questions of datasets
        (`parallel.cluster.joined`); entered when the settings are known to be right.
      command: the command that is noted in the results.
      **settings: the others of `evaluation.settings.Settings`, by name: `limit=100`,
        `predictions="answers.jsonl"`, `num_beams=1`.

    Returns:
      The content of `out/results.json`: `datasets` has the result of each; {} in all processes but
      the first.

    Raises:
      ValueError: a setting is unknown, cannot be so, or has no effect beside the others; records
        cannot be asked, or predictions not be scored.
      OSError: a file cannot be read or written.
    """
    chosen = Settings.of(checkpoint=checkpoint, datasets=datasets, data=data, out=out, **settings)
    with _on_disk(chosen) as local:
        if local.predictions:
            return benchmarks.score_predictions(local, command)
        if local.datasets:
            with joined or contextlib.nullcontext():
                if (address := address_of(chosen.out)) and jax.process_count() > 1:
                    raise ValueError(
                        f"out is {address}, but several processes need a folder that they all see: "
                        "mount the bucket, or start one process"
                    )
                return benchmarks.answer_benchmarks(local, command)
        return measure_families(local, _tuned_run(str(local.checkpoint)), command)


@contextlib.contextmanager
def _on_disk(settings: Settings) -> Iterator[Settings]:
    """The settings with files and `out` on the disk; `out` goes to its address as it grows."""
    files = {
        name: stores.input_path(path)
        for name in ("predictions", "candidates", "relevance")
        if (path := getattr(settings, name)) is not None
    }
    if settings.out is None:
        yield dataclasses.replace(settings, **files)
        return
    with stores.growing_folder(settings.out) as out:
        yield dataclasses.replace(settings, out=out, **files)


def _tuned_run(folder: str) -> TunedRun | None:
    """The run of that directory; None for anything else."""
    if is_remote(folder):
        folder = str(stores.input_checkpoint(folder))
    run = read_run(folder)
    if run is None:
        return None
    return TunedRun(
        data=run["config"]["validation"]["path"],
        start=f"{run['base']['sha256']} {run['config']['model']['init']}",
        before=functools.partial(load_untuned, run),
        recorded={"metrics": read_metrics(folder), "answers": read_answers(folder)},
    )
