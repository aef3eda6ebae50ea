"""A whole training run: reads the config, trains, validates and saves; a stopped run is resumed.

    workdir/
      config.json            variant (model sizes), frozen base, every field of the config
      run.lock               the process that is using the workdir, while it runs
      metrics.jsonl          numbers of steps and validations (also as `tensorboard/`)
      metrics.damaged.jsonl  lines of metrics.jsonl that could not be read on resuming
      answers.jsonl          a few sample answers of each validation
      report.html            the metrics as curves, written at the end of the run
      non_finite.jsonl       steps with a NaN or infinite loss, with their sample ids
      profile/               a profiler trace of some steps, if `train.profile_steps` > 0
      checkpoints/           see `checkpoints.py`

For a workdir in an object store (`gs://bucket/run`) a local temporary folder is used during the
run: each checkpoint is uploaded when it is saved, the small files with it.

Only this module and `setup.py` see the config; all other modules take keyword arguments.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jax_instructblip.atomic import write_file
from jax_instructblip.data import loader
from jax_instructblip.data.pairs import PairBatches
from jax_instructblip.data.train_batches import TrainBatches
from jax_instructblip.models.vlm import model_of
from jax_instructblip.parallel import peers
from jax_instructblip.parallel.cluster import Preemption, Watchdog, agree
from jax_instructblip.parallel.mesh import batch_sharding
from jax_instructblip.progress import Progress
from jax_instructblip.training import (
    earlier_run,
    metrics,
    patch_features,
    profiling,
    run_length,
    setup,
)
from jax_instructblip.training.checkpoints import Checkpoints, Meta
from jax_instructblip.training.initial import Initial
from jax_instructblip.training.metrics import MetricsWriter, Window, read_metrics
from jax_instructblip.training.non_finite import NonFiniteGuard
from jax_instructblip.training.run_meta import text_facts
from jax_instructblip.training.state import TrainState, create_state
from jax_instructblip.training.step import Metrics, Step, compile_step
from jax_instructblip.training.workdir import Workdir

REPORT = "report.html"


def run(
    config: ConfigDict,
    *,
    evaluate: setup.Evaluate | None = None,
    report: setup.Report | None = None,
    fresh: bool = False,
) -> str:
    """Trains as `config` (configs/common.py) says; returns the path or address of the workdir.

    Resumes from the newest checkpoint if the workdir has one.

    Args:
        config: the config of the run; all fields are checked first.
        evaluate: computes the validation scores (`evaluation.validation.evaluate`); without it, or
            without `config.validation.path`, nothing is validated.
        report: writes `report.html` at the end (`setup.Report`); None writes none.
        fresh: allows starting over if the workdir has metrics of an earlier run but its
            checkpoints are missing.

    Raises:
        ValueError: the config has an error, a checkpoint belongs to another run, or the loss is
            no longer finite.
        OSError: a checkpoint could not be written; earlier ones are intact.
    """
    workdir = setup.read_workdir(config)
    with Workdir(workdir) as opened:
        _run(config, opened, evaluate, report, fresh)
    return workdir


def _run(
    config: ConfigDict,
    workdir: Workdir,
    evaluate: setup.Evaluate | None,
    report: setup.Report | None,
    fresh: bool,
) -> None:
    mesh = setup.read_mesh(config)
    shared = setup.read_samples_per_row(config, mesh)
    rows = setup.read_rows(config, mesh)
    mixture = setup.read_mixture(config)
    config = run_length.with_steps(config, mixture)
    optimizer, schedule = run_length.make_optimizer(config)
    validated = setup.read_validation_records(config) if evaluate else None
    _print_lines(mixture.table())
    dtype, (frozen_dtype, _) = jnp.dtype(config.model.dtype), setup.read_frozen_dtype(config)
    setup.check_model(config)
    features = patch_features.open_features(config)
    initial = patch_features.read_initial(config, mesh)
    _print_lines(*initial.notes)
    batches = setup.read_batches(config, mixture, initial, rows, shared, features)
    model = model_of(initial.variant, dtype, setup.read_scans(config, mesh))
    objective = setup.make_objective(config, model)
    validation = setup.read_validation(
        config, evaluate, validated, model=model, text=batches.text, mesh=mesh
    )
    state = create_state(initial.trainable, optimizer, mesh)
    step = compile_step(
        like=state,
        mesh=mesh,
        mode=config.parallel.mode,
        narrow_weights=frozen_dtype.itemsize < 4,
        objective=objective,
        optimizer=optimizer,
        schedule=schedule,
        clip_norm=config.optimizer.clip_norm or None,
        accumulate=config.train.accumulate,
        skip_non_finite=config.train.non_finite == "skip",
    )
    peak = profiling.peak_flops(config.train.peak_flops)
    utilisation = profiling.Utilisation(
        initial.variant, sorted(initial.trainable), peak, patches=features is not None
    )
    tuning = _Run(config, workdir, initial, batches, step, validation, utilisation)
    del initial  # its trainable weights have been copied
    # Under pmap every device runs its own program, and no mesh may be set.
    with jax.set_mesh(mesh) if config.parallel.mode == "jit" else contextlib.nullcontext():
        tuning.begin(state, fresh)
        del state  # a checkpoint may have taken its place
        tuning.tune(
            batch_sharding(mesh),
            threads=config.data.threads,
            ahead=config.data.ahead,
            workers=config.data.workers,
        )
    if report is not None and jax.process_index() == 0:
        numbers, answers = read_metrics(workdir.folder), metrics.read_answers(workdir.folder)
        report(workdir.folder / REPORT, f"Training of {workdir}", numbers, answers)
        workdir.push()


class _Run:
    """State and output files of one run: `begin` restores or initialises, `tune` runs the steps."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Workdir,
        initial: Initial,
        batches: TrainBatches | PairBatches,
        step: Step,
        validation: setup.Validation | None,
        utilisation: profiling.Utilisation,
    ):
        self.location, self.workdir = workdir, workdir.folder
        self.batches, self.step, self.validation = batches, step, validation
        self.frozen, self.utilisation = initial.frozen, utilisation
        self.profile = {
            "folder": Path(config.train.profile_folder or self.workdir / "profile"),
            "steps": config.train.profile_steps,
        }
        self.steps, self.log_every = config.train.steps, config.train.log_every
        self.batch_size = config.data.batch_size
        self.save_every, self.hang_limit = config.checkpoints.every, config.train.hang_limit
        self.checkpoints = Checkpoints(
            self.workdir / "checkpoints",
            store=workdir.store and f"{workdir.store}/checkpoints",
            keep=config.checkpoints.keep,
            keep_every=config.checkpoints.keep_every,
        )
        self.non_finite_guard = NonFiniteGuard(
            self.workdir,
            skip=config.train.non_finite == "skip",
            limit=config.train.non_finite_limit,
            ids=batches.ids,
            checkpoints=self.checkpoints,
        )
        self.seed = config.seed
        self.meta: Meta = {
            "variant": initial.variant.to_dict(),
            "trainable": sorted(initial.trainable),
            "base": initial.base,
            **text_facts(batches.text),
        }
        self.document = {"kind": "run", **self.meta, "config": json.loads(config.to_json())}

    def begin(self, state: TrainState, fresh: bool) -> None:
        """Sets state, random key and first step: from the newest checkpoint, else from `state`."""
        self.state, self.rng = state, jax.random.key(self.seed)
        self.location.fetch()
        self.checkpoints.check_room(state)
        _in_first_process(lambda: earlier_run.set_incomplete_aside(self.checkpoints, fresh=fresh))
        self.first = self.checkpoints.newest()
        self.unscored = False
        if not self.first:
            location = self.checkpoints.location(0).removesuffix("/0")
            _in_first_process(
                lambda: earlier_run.set_metrics_aside(self.workdir, location, fresh=fresh)
            )
        else:
            like = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
                state,
            )
            for leaf in jax.tree.leaves(state):  # free the initial state before restoring another
                leaf.delete()
            self.state, self.rng, stored = self.checkpoints.restore(
                self.first, like, self.rng, self.meta
            )
            _compare_cursors(
                self.checkpoints.location(self.first), stored["data"], self.cursor(self.first)
            )
            _print_lines(f"resuming {self.location} at step {self.first} of {self.steps}")
            _print_lines(*earlier_run.changes(self.workdir, self.document["config"]))
            self.unscored = stored["score"] is None and self.validates(self.first)
        self.saved = bool(self.first)
        self.write_document()

    def write_document(self) -> None:
        """Writes config.json, on process 0 only."""
        if jax.process_index() == 0:
            document = {"format": 1, **self.document, earlier_run.SAVED: self.saved}
            write_file(self.workdir / earlier_run.CONFIG, json.dumps(document, indent=1) + "\n")

    def validates(self, number: int) -> bool:
        """Returns True if a validation is due after step `number`."""
        due = self.validation and (number == self.steps or number % self.validation.every == 0)
        return bool(due)

    def cursor(self, step: int) -> dict[str, Any]:
        """Returns the position in the data at `step`: step, seed and fingerprint of the sources.

        A checkpoint stores it, so that a resumed run can check that it reads the same data.
        """
        return {"step": step, "seed": self.seed, "fingerprint": self.batches.fingerprint()}

    def tune(self, sharding: jax.sharding.NamedSharding, **reading: int) -> None:
        """Runs the remaining steps, with batches put on devices by `sharding`.

        `reading` are keyword arguments of `loader.load`.
        """
        self.silent = jax.process_index() > 0
        self.writer = MetricsWriter(self.workdir, start=self.first, silent=self.silent)
        if self.writer.damaged:
            lost = f"{self.writer.damaged} damaged lines of {self.workdir / metrics.FILE}"
            _print_lines(f"{lost} are set aside in {metrics.DAMAGED}")
        self.window = Window(self.batch_size, self.utilisation)
        self.trace = profiling.Trace(
            self.profile["folder"], first=self.first, steps=self.profile["steps"]
        )
        self.preemption, self.watchdog = Preemption(), Watchdog(self.hang_limit)
        peers.on_loss(self.checkpoints.abandon)
        try:
            if self.first == 0 and self.validation and self.validation.first:
                self.validate(0)
            elif self.unscored:  # the earlier run ended before it validated its last checkpoint
                self.validate(self.first)
            if self.first < self.steps:
                self._loop(loader.load(self.batches, sharding, start=self.first, **reading))
            self.checkpoints.wait()
        finally:
            _print_lines(*filter(None, [self.trace.close()]))
            self.watchdog.close()
            self.preemption.close()
            self.checkpoints.close(wait=not isinstance(sys.exc_info()[1], KeyboardInterrupt))
            self.writer.close()
            if sys.exc_info()[0] is not None:
                with contextlib.suppress(OSError):  # the error that ended the run matters more
                    self.location.push()
        self.location.push()

    def _loop(self, loaded: Iterator[tuple[loader.DeviceBatch, loader.Counts]]) -> None:
        waiting: tuple[int, Metrics, loader.Counts] | None = None
        _print_lines("compiling the step")
        line = Progress(
            self.steps, "tuning", "steps", done=self.first, compiles=True, silent=self.silent
        )
        with line as progress:
            for number in range(self.first + 1, self.steps + 1):
                with self.window.timed("data"):
                    batch, counts = next(loaded)
                if number == self.first + 1 and jax.process_count() > 1:
                    # Compile, then wait for all: the first collective has a time limit (gloo: 30 s)
                    # that differences in compile time may exceed.
                    self.step.lower(self.state, self.frozen, batch, self.rng).compile()
                    peers.barrier()
                _print_lines(*filter(None, [self.trace.before(number, self.state)]))
                self.state, metrics = self.step(self.state, self.frozen, batch, self.rng)
                # The numbers of the step before are fetched while the device makes this one.
                if waiting is not None:
                    progress.update(note=self.record(*waiting))
                waiting = number, metrics, counts
                self.checkpoints.check()
                self.watchdog.alive()
                ends, stops = number == self.steps, self.preemption.reached(number)
                validates = self.validates(number)
                if validates or ends or stops or number % self.save_every == 0:
                    progress.update(note=self.record(*waiting))
                    waiting = None
                    self.save(number)
                    if validates and (ends or not stops):
                        self.validate(number)
                if stops and not ends:
                    self.checkpoints.wait()
                    _print_lines(
                        f"told to stop: saved step {number}; the same command goes on from there"
                    )
                    break

    def record(self, number: int, metrics: Metrics, counts: loader.Counts) -> str:
        """Adds the numbers of step `number` to `self.window`; writes a metrics line if it is due.

        Returns a note for the progress line, `loss 1.234`.

        Raises:
            ValueError: the loss or gradient is not finite and the run may not skip (more) steps.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.non_finite_guard.check(number, values)
        self.window.add(values, counts)
        if number % self.log_every == 0 or number in (1, self.steps):
            self.writer.write(number, self.window.close())
        return f"loss {values['loss']:.3f}"

    def validate(self, number: int) -> None:
        """Validates the saved weights of step `number`; writes scores and sample answers."""
        assert self.validation is not None
        began = time.monotonic()
        self.checkpoints.wait()  # an error or a kill during validation must not lose the steps
        answers: list[dict[str, Any]] = []
        scores = self.validation.measure({**self.frozen, **self.state.params}, answers.extend)
        self.window.skip(time.monotonic() - began)
        self.writer.write(number, {f"validation/{name}": value for name, value in scores.items()})
        self.writer.write_answers(number, answers)
        when = f"step {number}" if number else "before tuning"
        headline, value = next(iter(scores.items()))
        _print_lines(f"validation, {when}: {headline} {100 * value:.1f}")
        if number:
            self.checkpoints.record_score(number, scores["score"])

    def save(self, number: int) -> None:
        """Starts saving the current state as the checkpoint of step `number`."""
        meta = self.meta | {"data": self.cursor(number)}
        with self.window.timed("checkpoint"):
            self.location.check_owner()
            self.checkpoints.save(self.state, self.rng, meta, then=self.note_save)

    def note_save(self) -> None:
        """Records in config.json that a checkpoint exists; uploads small files to an object store.

        Called on process 0 after each completed save.
        """
        if not self.saved:
            self.saved = True
            self.write_document()
        self.location.push()


def _compare_cursors(folder: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises a ValueError if the checkpoint's data order (seed, sources, step) is not the run's."""
    wrong = [
        f"{name} was {stored.get(name)}, now {wanted[name]}"
        for name in ("step", "seed", "fingerprint")
        if stored.get(name) != wanted[name]
    ]
    if wrong:
        raise ValueError(
            f"{folder} was made with other data: {'; '.join(wrong)}. The fingerprint is of the "
            "seed, the batch size and the sources (content, weight, templates, `data.sampling`, "
            "`data.instructions`): restore them, or choose another workdir (config.model.init can "
            "start it from this run)"
        )


def _in_first_process(work: Callable[[], list[str]]) -> None:
    """Calls `work` on process 0 and prints the lines it returns; its error is raised everywhere."""
    problem = None
    if jax.process_index() == 0:
        try:
            _print_lines(*work())
        except (ValueError, OSError) as error:
            problem = error
    agree(problem)


def _print_lines(*lines: str) -> None:
    if jax.process_index() == 0:
        for line in lines:
            print(line, file=sys.stderr, flush=True)
