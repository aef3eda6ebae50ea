"""Training steps on eight CPU devices in a new process; prints the results as JSON.

    JAX_NUM_CPU_DEVICES=8 python -m tests.helpers.multi_device "meshes t5"

The function of that name is called with the words after it; of several calls the answers come in a
list. Sizes divide by eight wherever the rules split them, of the two vocabularies only one.
"""

import contextlib
import dataclasses
import functools
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from configs import common
from jax_instructblip import checkpoint
from jax_instructblip.checkpoint import trees
from jax_instructblip.data.loader import put
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from jax_instructblip.models.layers import Scan, Scans
from jax_instructblip.models.variants import (
    LlamaConfig,
    OptConfig,
    QFormerConfig,
    T5Config,
    Variant,
    VisionConfig,
)
from jax_instructblip.models.vlm import VisionLanguageModel
from jax_instructblip.parallel import rules
from jax_instructblip.parallel.mesh import batch_sharding, make_mesh
from jax_instructblip.planning import hlo
from jax_instructblip.training import loop, loss
from jax_instructblip.training.checkpoints import Checkpoints
from jax_instructblip.training.metrics import read_metrics
from jax_instructblip.training.objective import LanguageObjective
from jax_instructblip.training.optimizer import adamw
from jax_instructblip.training.state import create_state, partition
from jax_instructblip.training.step import compile_step, train_step
from tests.helpers.interpreter import run_module
from tests.helpers.numerics import random_params
from tests.helpers.tiny import compile_cache, make_batch, write_base, write_data

ROOT = Path(__file__).resolve().parents[2]
LANGUAGE = {
    "llama": LlamaConfig(width=32, heads=4, mlp=48, layers=5, vocab=61, pad_id=60),
    "t5": T5Config(
        width=32, head_width=8, heads=4, mlp=48, encoder_layers=5, decoder_layers=5, vocab=64
    ),
    "opt": OptConfig(width=32, heads=4, mlp=48, layers=5, vocab=64, eos_id=4),
}
LAYERS = (3, 5, 7)  # of the three towers, and of nothing else
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]
# Meshes whose steps are compared with those of one device: each of them with some kind, and each
# kind with one that splits weights both ways. To compile a step takes seconds.
# Each mesh once: compiling a step for one takes most of a minute.
STEP_MESHES = {"t5": [(1, 8, 1), (2, 2, 2)], "llama": [(1, 2, 4)], "opt": [(8, 1, 1)]}
STILL = {"qformer.dropout": 0.0, "llm.dropout": 0.0}
LOW = {"vision.layers": 2, "qformer.layers": 2}


def in_a_process(*calls: str) -> list[Any]:
    """The answers to these calls ("meshes t5") of a process that has eight devices."""
    return json.loads(run_module("tests.helpers.multi_device", *calls, devices=8).splitlines()[-1])


def divisible(kind: str, **fields: Any) -> Variant:
    vision = VisionConfig(image_size=28, width=16, layers=7, heads=4, mlp=24)
    qformer = QFormerConfig(
        16, 32, width=16, layers=6, heads=4, mlp=24, vocab=50, max_positions=16, queries=4
    )
    if kind == "opt":
        qformer = dataclasses.replace(qformer, instruction_aware=False)
    stage = "blip2" if kind == "opt" else "instructblip"
    return Variant(stage, vision, qformer, LANGUAGE[kind]).replace(**fields)


class Setting:
    """Weights and batches of a kind of model, the same on every mesh."""

    def __init__(self, kind: str, rows: int = 16, **fields: Any):
        self.variant, self.rows = divisible(kind, **fields), rows
        self.params = trees.flatten(random_params(self.variant))
        self.batches = [make_batch(self.variant, rows, seed=seed) for seed in range(3)]
        self.schedule = lambda _: 1e-3
        # Without the large eps Adam would make whole steps of gradients that are nothing but
        # rounding (key biases), and those differ between meshes.
        self.optimizer = adamw(self.schedule, eps=1e-3)

    def place(self, mesh):
        """The state, the frozen weights and the batches, on the devices of the mesh."""
        params = trees.unflatten(
            {path: rules.place(path, leaf, mesh, np.float32) for path, leaf in self.params.items()}
        )
        chosen, frozen = partition(params, ("qformer",))
        rows = np.arange(self.rows)
        batches = [put(each, batch_sharding(mesh), rows, self.rows) for each in self.batches]
        return create_state(chosen, self.optimizer, mesh), frozen, batches

    def settings(self, remat="none", weights=rules.constrain_layer):
        scan = Scan(remat, weights)
        model = VisionLanguageModel(self.variant, jnp.float32, Scans(scan, scan, scan))
        return dict(
            objective=LanguageObjective(model), optimizer=self.optimizer, schedule=self.schedule
        )

    def train(self, mesh, steps=10, mode="jit", remat="none", **settings):
        """Losses of the steps, and the trained weights after the first and the last."""
        state, frozen, batches = self.place(mesh)
        settings = self.settings(remat) | settings
        step = compile_step(like=state, mesh=mesh, mode=mode, **settings)
        losses, kept = [], []
        with jax.set_mesh(mesh) if mode == "jit" else contextlib.nullcontext():
            for number in range(steps):
                state, metrics = step(state, frozen, batches[number % 3], jax.random.key(0))
                losses.append(float(metrics["loss"]))
                if number in (0, steps - 1):
                    kept.append(jax.tree.map(np.asarray, trees.flatten(state.params)))
        return losses, kept


def largest(found, expected) -> float:
    """The largest absolute difference of two trees."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(np.subtract(a, b)).max()) for a, b in pairs)


def mesh_of(sizes):
    return make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def meshes(kind):
    """Losses on one device; how far losses and weights are from there on each mesh."""
    setting = Setting(kind, **LOW)
    expected = setting.train(mesh_of(MESHES[0]))
    before = {path: setting.params[path] for path in expected[1][1]}
    found = {"losses": expected[0], "moved": largest(expected[1][1], before), "differences": {}}
    for sizes in STEP_MESHES[kind]:
        losses, kept = setting.train(mesh_of(sizes))
        found["differences"][str(sizes)] = largest(losses, expected[0]), largest(kept, expected[1])
    return found


def roads(kind):
    """Distances from one device of what must not differ: pmap, parts of a batch, remat.

    The parts have two rows a device: so few are what XLA has confused (`layers.constrain`).
    """
    setting = Setting(kind, **LOW, **STILL)
    expected = setting.train(mesh_of((1, 1, 1)))
    others = {"pmap": dict(sizes=(8, 1, 1), mode="pmap")}
    if kind == "t5":
        others["parts"] = dict(sizes=(2, 2, 2), accumulate=2, remat="full")
    else:
        others["pmap in parts"] = dict(sizes=(8, 1, 1), mode="pmap", accumulate=2, remat="dots")
    found = {}
    for name, given in others.items():
        losses, kept = setting.train(mesh_of(given.pop("sizes")), **given)
        found[name] = largest(losses, expected[0]), largest(kept, expected[1])
    return found


def shares():
    """The part of the bytes of big leaves that each mesh puts on its first device, and others."""
    found = {}
    for kind in LANGUAGE:
        setting = Setting(kind)
        for sizes in MESHES[1:]:
            state, frozen, _ = setting.place(mesh_of(sizes))
            parts = {"frozen": frozen, "trained": state.params, "moments": state.optimizer}
            found[f"{kind} {sizes}"] = {name: _share(tree) for name, tree in parts.items()}
    return found


def _share(tree):
    big = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if re.search(r"(attention|mlp|head|projection)(/\w+)?/kernel", rules.path_of(path))
    ]
    here = sum(leaf.addressable_shards[0].data.nbytes for leaf in big)
    return len(big), here / sum(leaf.nbytes for leaf in big)


def programs():
    """Shapes that the compiled step fetches over `fsdp`: whole stacks, and single layers.

    Once as it is, once with the stacks fetched ahead of their scans; and the constraints on weights
    in the layers.
    """
    setting, mesh = Setting("llama"), mesh_of((1, 8, 1))
    state, frozen, batches = setting.place(mesh)
    step = functools.partial(train_step, **setting.settings())

    def hoisted(state, frozen, batch, rng):
        whole = NamedSharding(mesh, PartitionSpec())
        frozen = jax.lax.with_sharding_constraint(frozen, whole)
        return step(state, frozen, batch, rng)

    arguments = state, frozen, batches[0], jax.random.key(0)
    with jax.set_mesh(mesh):
        constraints = _constraints(jax.make_jaxpr(step)(*arguments).jaxpr)
        texts = {
            name: jax.jit(each).lower(*arguments).compile().as_text()
            for name, each in (("step", step), ("hoisted", hoisted))
        }
    return {"constraints": constraints} | {name: _fetched(text) for name, text in texts.items()}


def _fetched(text):
    shapes = [
        tuple(map(int, sizes.split(",")))
        for made in re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
        for sizes in re.findall(r"\w+\[([\d,]+)\]", made)
    ]
    stacks = [shape for shape in shapes if shape[0] in LAYERS and len(shape) > 2]
    return {"stacks": stacks, "others": [shape for shape in shapes if shape not in stacks]}


def _constraints(jaxpr, inside=False):
    """Shapes of what is constrained to lie in parts inside of scans."""
    found = []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if inside and name == "sharding_constraint":
            spec = equation.params["sharding"].spec
            if "fsdp" in spec:  # activations have ("data", "fsdp") instead
                found.append(equation.invars[0].aval.shape)
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    found += _constraints(part, inside or name == "scan")
    return found


def words():
    """The collectives of a loss in chunks on a mesh, and its distance from the plain one."""
    loss.CHUNK = 4  # of two rows a device: chunks of 3, 3 and 1 of the 7 targets
    mesh, rng = make_mesh(1, 4, 2), np.random.default_rng(0)
    x, kernel = rng.normal(size=(8, 7, 16)), rng.normal(size=(16, 24))
    x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    targets = rng.integers(0, 24, (8, 7))
    put_on = lambda leaf, *spec: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))
    rows = ("data", "fsdp")
    split = put_on(x, rows), put_on(kernel, "fsdp", "tensor"), put_on(targets, rows)
    of = lambda function: jax.value_and_grad(function, argnums=(0, 1))
    chunked = lambda x, kernel, targets: loss.word_loss(x, kernel, "DV", targets, x.dtype)
    plain = lambda x, kernel: loss.cross_entropy(x @ kernel, targets)
    placed = None, tuple(leaf.sharding for leaf in split[:2])
    function = jax.jit(of(chunked), out_shardings=placed)
    with jax.set_mesh(mesh):
        text = function.trace(*split).lower().compile().as_text()
        found = function(*split)
    with jax.default_matmul_precision("highest"):
        expected = of(plain)(x, kernel)
    program = hlo.read_program(text, mesh.size)
    return {
        "distance": largest(found, expected),
        "collectives": [[each.kind, each.shape, each.times] for each in program.collectives],
    }


def restores():
    """Tells whether a state saved on some devices is the same, and lies right, on others."""
    setting = Setting("llama")
    meta = {"variant": {}, "trainable": ["qformer"], "base": {"path": "b", "sha256": "0"}}
    meta["data"] = {}
    found = {}
    for before, after in (
        ((1, 1, 1), (2, 2, 2)),
        ((1, 8, 1), (1, 1, 1)),
        ((2, 2, 2), (1, 2, 2)),
    ):
        saved = setting.place(mesh_of(before))[0]
        saved = jax.tree.map(lambda leaf: leaf + 1, saved)
        like = setting.place(mesh_of(after))[0]
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = Checkpoints(folder)
            checkpoints.save(saved, jax.random.key(1), meta)
            checkpoints.wait()
            state, _, _ = checkpoints.restore(1, like, jax.random.key(0), meta)
        same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), state, saved)
        placed = jax.tree.map(lambda a, b: a.sharding == b.sharding, state, like)
        found[f"{before} to {after}"] = [jax.tree.all(same), jax.tree.all(placed)]
    return found


def runs(folder):
    """Losses, validations and weights of whole runs of four steps, each along other roads."""
    base = write_base(Path(folder) / "base", **{**SIZES, **STILL})
    data = write_data(Path(folder) / "data", count=16)
    found, weights = {}, {}
    for name, *roads in (
        ("jit", (4, JIT)),
        ("pmap, then jit", (2, PMAP), (4, JIT)),
        ("jit, then pmap", (2, JIT), (4, PMAP)),
        ("split", (4, SPLIT)),
    ):
        workdir = Path(folder) / name
        with compile_cache(Path(folder) / "compiled"):
            for steps, road in roads:
                loop.run(_config(base, data, workdir, steps, road), evaluate=_evaluate)
        lines = read_metrics(workdir)
        found[name] = {
            "losses": [line["loss"] for line in lines if "loss" in line],
            "scores": [line["validation/score"] for line in lines if "validation/score" in line],
        }
        kept = checkpoint.read_tree(workdir / "checkpoints" / "4" / "trainable")
        weights[name] = trees.flatten(kept)
    for name, run in found.items():
        run["difference"] = largest(weights[name], weights["jit"])
    return found


def _evaluate(
    *, model, params, text, records, mesh, limit, batch_size, max_new_tokens, path, split, **_
):
    """The mean log-probability of the answers: a number that tells weights apart."""
    blip = InstructBlipPipeline(model.variant, params, text, dtype=model.dtype, mesh=mesh)
    images, prompts = zip(*((list(each.images), each.prompt) for each in records), strict=True)
    answers = blip.generate(
        list(images), list(prompts), batch_size=batch_size, max_new_tokens=max_new_tokens
    )
    return {"score": float(np.mean([each.logprob for each in answers]))}


SIZES = {
    **{"vision.width": 16, "vision.heads": 4, "vision.mlp": 24, "qformer.vision_width": 16},
    **{"qformer.llm_width": 32, "qformer.mlp": 24, "llm.width": 32, "llm.heads": 4, "llm.mlp": 48},
}
JIT, PMAP = {"parallel.mode": "jit"}, {"parallel.mode": "pmap"}
SPLIT = {
    **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "train.accumulate": 2},
    **{"model.remat.qformer": "full", "model.remat.llm": "dots"},
}


def _config(base, data, workdir, steps, road):
    config = common.get_config()
    with config.unlocked():
        config.data.sources = {"colors": common.source(str(data))}
    values = {
        "workdir": str(workdir),
        "model.checkpoint": str(base),
        "model.dtype": "float32",
        "model.frozen_dtype": "float32",
        "data.batch_size": 8,
        "data.buckets": (),
        "data.augment": False,
        "data.threads": 1,
        "text.qformer_limit": 12,
        "text.prompt_limit": 12,
        "text.answer_limit": 6,
        "train.steps": steps,
        "train.log_every": 1,
        "train.peak_flops": 1e12,  # so that products are counted along both roads
        "optimizer.learning_rate": 1e-3,
        "optimizer.eps": 1e-3,
        "optimizer.warmup_steps": 1,
        "checkpoints.every": 2,
        "validation.path": str(data),
        "validation.every": 4,
        "validation.batch_size": 16,
        "validation.max_new_tokens": 3,
    }
    config.update_from_flattened_dict(values | road)
    return config


if __name__ == "__main__":
    calls = [call.split(maxsplit=1) for call in sys.argv[1:]]
    print(json.dumps([globals()[name](*words) for name, *words in calls]))
