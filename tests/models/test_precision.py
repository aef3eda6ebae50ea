"""The exactness of programs: the precision of products, the dtype of residual streams."""

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.lax import Precision

from jax_instructblip.inference.beam_search import beam_tokens
from jax_instructblip.inference.decode import generate_tokens
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.pipeline import load
from jax_instructblip.inference.ranking import make_plan, pair_logprobs
from jax_instructblip.models.flops import products
from jax_instructblip.models.layers import Scan, Scans
from jax_instructblip.models.qformer import QFormer
from jax_instructblip.models.vision import VisionTransformer
from jax_instructblip.models.vlm import (
    LANGUAGE_MODELS,
    VisionLanguageModel,
    param_shapes,
    unstack_decoder,
)
from jax_instructblip.parallel.mesh import make_mesh
from jax_instructblip.training.objective import LanguageObjective
from jax_instructblip.training.optimizer import adamw
from jax_instructblip.training.state import create_state, partition
from jax_instructblip.training.step import compile_step, train_step
from tests.helpers.numerics import random_params
from tests.helpers.tiny import make_batch, tiny_variant, write_base

KINDS = ("llama", "t5")
NARROW = (jnp.bfloat16, jnp.float16)
HIGHEST = (Precision.HIGHEST, Precision.HIGHEST)


def asked(function: Any, *arguments: Any) -> list[Any]:
    """The precision that each product of the program asks for."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    found = [equation.params["precision"] for equation, _ in products(jaxpr)]
    assert len(found) > 20
    return found


@functools.cache
def parameters(kind: str) -> dict[str, Any]:
    return jax.tree.map(jnp.asarray, random_params(tiny_variant(kind)))


def programs(model: VisionLanguageModel, params: Any) -> dict[str, Any]:
    """The programs that answer, rank and validate, as calls without arguments."""
    batch = jax.tree.map(jnp.asarray, make_batch(model.variant))
    keys = jax.random.split(jax.random.key(0), 4)
    plan = make_plan([[(3, 4, 5), (3, 6)]])
    given = model, params, batch
    return {
        "generate": lambda: generate_tokens(*given, keys, GenerationConfig(max_new_tokens=3)),
        "beam": lambda: beam_tokens(*given, GenerationConfig(max_new_tokens=3, num_beams=2)),
        "rank": lambda: pair_logprobs(*given, plan.chunks),
        "logits": lambda: model.apply({"params": params}, batch),
    }


@pytest.mark.parametrize(
    ("program", "unstacked"),
    [(name, False) for name in ("generate", "beam", "rank", "logits")] + [("generate", True)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_in_float32_are_float32_everywhere(kind, program, unstacked):
    params = parameters(kind)
    params = unstack_decoder(tiny_variant(kind), params) if unstacked else params
    scans = Scans(llm=Scan(unstacked=unstacked))
    model = VisionLanguageModel(tiny_variant(kind), jnp.dtype("float32"), scans)
    assert set(asked(programs(model, params)[program])) == {HIGHEST}


@pytest.mark.parametrize("program", ["generate", "rank"])
def test_narrow_answers_ask_for_nothing(program):
    model = VisionLanguageModel(tiny_variant("t5"), jnp.dtype("bfloat16"))
    assert set(asked(programs(model, parameters("t5"))[program])) == {None}


def streams(jaxpr: Any) -> Iterator[Any]:
    """The dtype of every stream `[B, T, D]` that a scan carries from layer to layer."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            first = equation.params["num_consts"]
            for each in equation.invars[first : first + equation.params["num_carry"]]:
                if each.aval.ndim == 3 and jnp.issubdtype(each.aval.dtype, jnp.floating):
                    yield each.aval.dtype
        for value in jax.tree.leaves(list(equation.params.values())):
            yield from streams(getattr(value, "jaxpr", value)) if hasattr(value, "eqns") else ()


@pytest.mark.parametrize("program", ["generate", "beam", "rank", "logits"])
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_layers_are_summed_in_float32(kind, program):
    model = VisionLanguageModel(tiny_variant(kind), jnp.dtype("bfloat16"))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), parameters(kind))
    found = list(streams(jax.make_jaxpr(programs(model, params)[program])().jaxpr))
    assert len(found) >= 3 and set(found) == {jnp.dtype("float32")}, found


@pytest.mark.parametrize("kind", KINDS)
def test_so_are_the_gradients_of_a_training_step(kind):
    """Also what all layers add to, of the image's features and of the encoder's output."""
    found = list(streams(step_jaxpr(kind, jnp.bfloat16)))
    assert len(found) >= 5 and set(found) == {jnp.dtype("float32")}, found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_a_loaded_model(tmp_path, dtype):
    blip = load(write_base(tmp_path / "base"), dtype=dtype)
    batch = jax.tree.map(jnp.asarray, make_batch(blip.variant))
    keys = jax.random.split(jax.random.key(0), 4)
    found = asked(
        lambda params: generate_tokens(
            blip.model, params, batch, keys, GenerationConfig(max_new_tokens=2)
        ),
        blip.params,
    )
    assert set(found) == ({HIGHEST} if dtype == "float32" else {None})


def step_precisions(kind: str, dtype: Any, **settings: Any) -> list[Any]:
    """The precision that each product of a training step asks for."""
    found = [each.params["precision"] for each, _ in products(step_jaxpr(kind, dtype, **settings))]
    assert len(found) > 20
    return found


def step_jaxpr(kind: str, dtype: Any, *, mode: str = "jit", remat: str = "none", **more: Any):
    variant, optimizer, rate = tiny_variant(kind), adamw(lambda _: 1e-2), lambda _: 1e-2
    scans = Scans(*(Scan(remat=remat) for _ in range(3)))
    objective = LanguageObjective(VisionLanguageModel(variant, dtype, scans))
    settings = dict(objective=objective, optimizer=optimizer, schedule=rate)
    chosen, frozen = partition(param_shapes(variant), ("qformer",))
    if mode == "pmap":
        step = compile_step(mode="pmap", mesh=make_mesh(data=1), **settings, **more)
    else:
        step = functools.partial(train_step, **settings, **more)
    state = jax.eval_shape(functools.partial(create_state, optimizer=optimizer), chosen)
    return jax.make_jaxpr(step)(state, frozen, make_batch(variant), jax.random.key(0)).jaxpr


@pytest.mark.parametrize(("kind", "remat"), [("llama", "none"), ("t5", "dots"), ("t5", "full")])
def test_a_training_step_in_float32_is_float32_forward_and_backward(kind, remat):
    assert set(step_precisions(kind, jnp.float32, remat=remat)) == {HIGHEST}


@pytest.mark.parametrize("more", [{"mode": "pmap"}, {"accumulate": 2}], ids=["pmap", "parts"])
def test_however_the_step_is_run(more):
    assert set(step_precisions("t5", jnp.float32, **more)) == {HIGHEST}


@pytest.mark.parametrize("dtype", NARROW, ids=["bfloat16", "float16"])
def test_a_narrow_step_asks_for_nothing(dtype):
    assert set(step_precisions("llama", dtype)) == {None}


def test_what_surrounds_the_model_does_not_make_float32_less():
    with jax.default_matmul_precision("bfloat16"):
        assert set(step_precisions("t5", jnp.float32)) == {HIGHEST}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_alone(kind):
    params, variant = parameters(kind), tiny_variant(kind)
    prompt, valid = jnp.zeros((1, 3, 24)), jnp.ones((1, 3), bool)
    ids = jnp.ones((1, 3), jnp.int32)
    towers = {
        "vision": (VisionTransformer, jnp.zeros((1, 28, 28, 3), jnp.uint8)),
        "qformer": (QFormer, jnp.zeros((1, 5, 22)), ids, valid),
        "llm": (LANGUAGE_MODELS[kind], prompt, *[ids] * (5 if kind == "t5" else 3)),
    }
    for name, (tower, *inputs) in towers.items():
        apply = tower(getattr(variant, name), jnp.float32).apply
        jaxpr = jax.make_jaxpr(apply)({"params": params[name]}, *inputs).jaxpr
        assert {each.params["precision"] for each, _ in products(jaxpr)} == {HIGHEST}, name


@pytest.mark.full
@pytest.mark.parametrize("name", ["sharp tiny T5", "sharp tiny Vicuna"])
def test_bfloat16_is_no_farther_from_float64_than_autocast(name):
    pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    found = importlib.import_module("benchmarks.precision").run_case(name)
    assert found["float32"]["logits_mean"] < 1e-5  # both sides compute the same thing
    for key in ("logits_mean", "gradient", "drift"):
        assert found["bfloat16"][key] < found["autocast"][key], key
