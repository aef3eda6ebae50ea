"""Peak memory of saving and restoring a large trained tree, in each of two processes.

python -m benchmarks.checkpoint_memory [--gigabytes 2] [--folder DIR] [--out FILE]

The tree has the leaves of a decoder in float32 and Adam's two moments of each, split over the
devices of two processes (gloo). A first pair of processes creates and saves it, a second pair
restores it. Reported is the peak of the resident memory (VmHWM, reset before) minus the memory just
before: with the state in place when saving, without a state when restoring.
"""

import argparse
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jax_instructblip.parallel import rules
from jax_instructblip.parallel.mesh import make_mesh
from jax_instructblip.training.checkpoints import Checkpoints
from jax_instructblip.training.optimizer import adamw
from jax_instructblip.training.state import TrainState, create_state

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROCESSES = 2
LAYERS, WIDTH, MLP, HEADS = 8, 2048, 8192, 16  # 2.15e9 bytes of float32
STEP = 7
META = {
    "variant": {"llm": "layers alone"},
    "trainable": ["llm"],
    "base": {"name": "none", "path": "none", "sha256": "0" * 64},
    "data": {"step": STEP},
}


def shapes(gigabytes: float) -> Any:
    """Returns the shapes and dtypes of a training state whose weights have so many gigabytes."""
    layers = max(1, round(LAYERS * gigabytes / 2))
    head = (layers, WIDTH, HEADS, WIDTH // HEADS)
    out = (layers, HEADS, WIDTH // HEADS, WIDTH)
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
    mlp = {name: {"kernel": leaf(layers, WIDTH, MLP)} for name in ("gate", "in")}
    mlp["out"] = {"kernel": leaf(layers, MLP, WIDTH)}
    attention = {name: {"kernel": leaf(*head)} for name in ("query", "key", "value")}
    attention["out"] = {"kernel": leaf(*out)}
    norm = {"scale": leaf(layers, WIDTH)}
    params = {"llm": {"layers": {"mlp": mlp, "attention": attention, "norm": norm}}}
    return jax.eval_shape(lambda tree: create_state(tree, adamw(lambda _: 1e-4)), params)


def values(number: int, shape: tuple[int, ...], dtype: Any, index: Any) -> np.ndarray:
    """Returns the test values of a part of leaf `number`; every row differs.

    `shape` is that of the whole leaf, `index` a tuple of slices, one for each axis.
    """
    if not shape:
        return np.asarray(number, dtype)
    bounds = [axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)]
    rows = np.arange(*bounds[-1], dtype=np.float32) + 1000 * number
    firsts = [np.arange(*pair, dtype=np.float32) for pair in bounds[:-1]]
    made = np.empty([end - begin for begin, end in bounds], dtype)
    made[...] = rows
    for axis, first in enumerate(firsts):
        made += (first * 0.001).reshape([-1 if i == axis else 1 for i in range(made.ndim)])
    return made


def memory(name: str) -> int:
    """Returns `VmRSS` or `VmHWM` of this process in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def measured(work: Any) -> tuple[Any, dict[str, int | float]]:
    """Returns the result of `work()` and a dict: bytes before, peak bytes above these, seconds."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current use
    before, began = memory("VmRSS"), time.monotonic()
    result = work()
    peak = memory("VmHWM")
    return result, {
        "before_bytes": before,
        "peak_above_bytes": peak - before,
        "seconds": round(time.monotonic() - began, 1),
    }


def work(phase: str, folder: str, gigabytes: float) -> dict[str, Any]:
    """Runs one of the two processes: `phase` "save" creates and saves a state, else restores it.

    A restored state is compared with the test values. Returns the memory figures in bytes, with
    this process's share of the state as `own_bytes`.
    """
    mesh = make_mesh(data=1, fsdp=PROCESSES, tensor=1)
    tree = shapes(gigabytes)
    flat, treedef = jax.tree.flatten(tree)
    placed = jax.tree.leaves(rules.shardings(tree, mesh))
    rng = jax.random.key(0)
    manager = Checkpoints(pathlib.Path(folder))
    likes = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        for leaf, where in zip(flat, placed, strict=True)
    ]
    like: TrainState = jax.tree.unflatten(treedef, likes)
    expected = lambda number, leaf: lambda index: values(number, leaf.shape, leaf.dtype, index)
    if phase == "save":
        leaves = [
            jax.make_array_from_callback(leaf.shape, leaf.sharding, expected(number, leaf))
            for number, leaf in enumerate(likes)
        ]
        state = jax.tree.unflatten(treedef, leaves)
        state = state._replace(step=state.step + STEP)

        def save() -> None:
            manager.save(state, rng, META)
            manager.wait()

        _, found = measured(save)
    else:
        restore = lambda: manager.restore(STEP, like, rng, META)
        (state, _, _), found = measured(restore)
        for number, leaf in enumerate(jax.tree.leaves(state)):
            for shard in leaf.addressable_shards if leaf.ndim else ():
                wanted = values(number, leaf.shape, leaf.dtype, shard.index)
                np.testing.assert_array_equal(np.asarray(shard.data), wanted)
    own = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards
    )
    limit = 1.2 * own + 0.5e9
    return found | {
        "own_bytes": own,
        "limit_bytes": limit,
        "share": found["peak_above_bytes"] / own,
    }


def run(phase: str, folder: str, gigabytes: float) -> list[dict[str, Any]]:
    """Runs the two processes of `phase`, "save" or "restore"; returns what each has measured."""
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "benchmarks.checkpoint_memory", "--gigabytes", str(gigabytes)]
    words += ["--folder", folder, "--phase", phase, "--coordinator", f"localhost:{port}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    started = [
        subprocess.Popen(
            [*words, "--process", str(index)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
        )
        for index in range(PROCESSES)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"a process of {phase} failed")
    return [json.loads(text.splitlines()[-1]) for text in said]


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and writes the result; returns 1 if a peak exceeds its limit, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the tree, without moments")
    parser.add_argument("--folder", default="", help="where it is saved (default: a temporary one)")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/checkpoint_memory.json"))
    for name in ("--phase", "--coordinator"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, default=0, help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.phase:
        jax.distributed.initialize(flags.coordinator, PROCESSES, flags.process)
        # Synchronise now, while both have just started: gloo's first collective has 30 seconds.
        multihost_utils.sync_global_devices("begin")
        print(json.dumps(work(flags.phase, flags.folder, flags.gigabytes)), flush=True)
        jax.distributed.shutdown()
        return 0
    with tempfile.TemporaryDirectory(dir=flags.folder or None) as folder:
        phases = {phase: run(phase, folder, flags.gigabytes) for phase in ("save", "restore")}
    tree = shapes(flags.gigabytes)
    size = lambda part: sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(part))
    result = {
        "what": "peak memory of each of 2 gloo processes above what it was before, in bytes",
        "command": " ".join(["python -m benchmarks.checkpoint_memory", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: importlib.metadata.version(name) for name in ("jax", "numpy")},
        "date": time.strftime("%Y-%m-%d"),
        "tree_bytes": size(tree.params),
        "tree_and_moments_bytes": size(tree),
        **phases,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if flags.out:
        pathlib.Path(flags.out).write_text(text + "\n")
    measures = [each for phase in phases.values() for each in phase]
    return int(any(each["peak_above_bytes"] > each["limit_bytes"] for each in measures))


if __name__ == "__main__":
    sys.exit(main())
