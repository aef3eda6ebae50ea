import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.parallel.mesh import make_mesh
from jax_instructblip.training.loss import cross_entropy
from jax_instructblip.training.objective import LanguageObjective
from jax_instructblip.training.step import compile_step, train_step


@dataclasses.dataclass(frozen=True)
class TwoTerms:
    """A loss of two terms with totals of their own: what pre-training will have."""

    whole_batch: str = ""

    def totals(self, batch):
        return {"rows": jnp.float32(len(batch["x"])), "kept": batch["keep"].sum()}

    def __call__(self, params, batch, rng, totals):
        del rng
        distance = jnp.square(params["a"]["kernel"] - batch["x"])
        first = distance.sum() / totals["rows"]
        second = (distance * batch["keep"]).sum() / totals["kept"]
        return first + second, {"first": first, "second": second}


BATCH = {
    "x": np.array([1.0, 2.0, 4.0, 8.0], np.float32),
    "keep": np.array([1.0, 0.0, 1.0, 1.0], np.float32),
}


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_terms_of_any_objective_add_up_over_parts(tuning, parts):
    settings, *_ = tuning("llama")
    settings = {**settings, "objective": TwoTerms()}
    from jax_instructblip.training.state import create_state

    state = create_state({"a": {"kernel": jnp.zeros(())}}, settings["optimizer"])
    _, metrics = train_step(state, {}, BATCH, jax.random.key(0), **settings, accumulate=parts)
    squares = BATCH["x"] ** 2
    first, second = squares.mean(), squares[BATCH["keep"] > 0].mean()
    expected = {"first": first, "second": second, "loss": first + second, "rows": 4, "kept": 3}
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value), name
    slope = 2 * (BATCH["x"].mean() + BATCH["x"][BATCH["keep"] > 0].mean())
    assert metrics["gradient_norm"] == pytest.approx(slope)


def test_what_needs_the_whole_batch_refuses_to_be_divided(tuning):
    settings, *_ = tuning("llama")
    whole = TwoTerms("it compares each image with all texts")
    settings = {**settings, "objective": whole}
    with pytest.raises(ValueError, match="in parts .config.train.accumulate.*compares each image"):
        compile_step(**settings, accumulate=2)
    with pytest.raises(ValueError, match="in pmap .config.parallel.mode.*compares each image"):
        compile_step(**settings, mode="pmap", mesh=make_mesh(devices=jax.devices()[:1]))
    compile_step(**settings)


def test_the_language_objective_is_the_mean_over_targets(tuning):
    settings, state, frozen, batch = tuning("t5", **{"qformer.dropout": 0.0, "llm.dropout": 0.0})
    objective, batch = settings["objective"], jax.tree.map(jnp.asarray, batch)
    assert isinstance(objective, LanguageObjective)
    totals = objective.totals(batch)
    assert totals == {"tokens": (batch["targets"] >= 0).sum()}
    params = {**frozen, **state.params}
    loss, told = objective(params, batch, jax.random.key(0), totals)
    logits = objective.model.apply({"params": params}, batch)
    assert told == {}
    assert loss == pytest.approx(float(cross_entropy(logits, batch["targets"]) / totals["tokens"]))


def test_a_batch_without_targets_has_a_loss_of_nothing(tuning):
    settings, state, frozen, batch = tuning("llama")
    batch = {**batch, "targets": np.full_like(batch["targets"], -100)}
    batch = jax.tree.map(jnp.asarray, batch)
    after, metrics = train_step(state, frozen, batch, jax.random.key(0), **settings)
    assert metrics["loss"] == 0 and metrics["tokens"] == 0 and metrics["gradient_norm"] == 0
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))
