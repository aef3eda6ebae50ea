"""The entry points that combine training and evaluation: `train` and `evaluate`."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from jax_instructblip import stores
from jax_instructblip.evaluation import benchmarks, beside, validation
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
    """Trains the Q-Former, or other parts, as a config says; resumes an existing run.

    Ctrl-C or SIGTERM saves a checkpoint and ends. Progress is printed to stderr.

    Args:
      config: a config with the fields of `configs/common.py`, or the path of a Python file whose
        `get_config()` returns one.
      overrides: new values of some fields, by dotted names: `{"train.steps": 100}`.
      fresh: start over if an earlier run has left metrics in the workdir but its checkpoints are
        missing.
      joined: a context in which this process is part of a multi-process run
        (`parallel.cluster.joined`); entered after the config has been checked.

    Returns:
      The run directory, `config.workdir`, which `load`, `evaluate`, `export` and `merge` accept.

    Raises:
      ValueError: an unknown field or invalid value, unusable data, a checkpoint of another run, or
        a loss that is no longer finite.
      OSError: a file cannot be read, or a checkpoint cannot be written.
    """
    if not isinstance(config, ConfigDict):
        config = load_config(config)
    if overrides:
        config = change_fields(config, overrides)
    check_config(config, run=True)  # before validation records are read, which may be slow
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
    """Scores a model on benchmarks, next to the paper's numbers, or by family of questions.

    A family is the set of records with the same `task`. Prints the results. Answers that are
    already in `out` are reused.

    Args:
      checkpoint: a Hugging Face folder, a converted folder, a run, or the name of an embedded
        checkpoint. It, `data`, `out` and the files of other settings may be object-store addresses
        (`gs://bucket/run`). None is allowed with the setting `predictions` only.
      datasets: benchmarks, as a list or one text with commas; "held_out" means all of the paper's
        table 1. Without any, exact match is computed by family.
      data: output of `jax-instructblip prepare`, or the datasets' original files; for families a
        JSON-lines file or `shapes`, by default what the run was validated on.
      out: the folder to write to; for families by default the run. With `datasets` or the setting
        `beside`, `data` and `out` are required.
      joined: a context in which this process is one of several that share the questions of
        datasets (`parallel.cluster.joined`); entered after the settings have been checked.
      command: the command line to record in the results.
      **settings: other fields of `evaluation.settings.Settings`, such as `limit=100`,
        `predictions="answers.jsonl"`, `num_beams=1`.

    Returns:
      The content of `out/results.json`, whose `datasets` has the result of each; with the setting
      `beside`, by the ways of answering (`evaluation.beside.WAYS`) and by model. In all processes
      except process 0 it returns {}.

    Raises:
      ValueError: an unknown or invalid setting, one that has no effect with the others, records
        that cannot be asked, or predictions that cannot be scored.
      OSError: a file cannot be read or written.
    """
    chosen = Settings.of(checkpoint=checkpoint, datasets=datasets, data=data, out=out, **settings)
    with _on_disk(chosen) as local:
        if local.predictions:
            return benchmarks.score_predictions(local, command)
        if local.datasets or local.beside:
            with joined or contextlib.nullcontext():
                if (address := address_of(chosen.out)) and jax.process_count() > 1:
                    raise ValueError(
                        f"out is {address}, but several processes need a folder that they all see: "
                        "mount the bucket, or start one process"
                    )
                answer = beside.answer_beside if local.beside else benchmarks.answer_benchmarks
                return answer(local, command)
        return measure_families(local, _tuned_run(str(local.checkpoint)), command)


@contextlib.contextmanager
def _on_disk(settings: Settings) -> Iterator[Settings]:
    """Yields the settings with local copies of files at object-store addresses.

    A local copy of `out` is uploaded to its address regularly and when the block ends.
    """
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
    """Returns facts about the run directory `folder`; None if it is no run."""
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
