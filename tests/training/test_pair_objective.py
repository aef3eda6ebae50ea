"""Contrast, match and caption: their negatives, their sums, and the devices that share them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.models.blip2 import Blip2
from jax_instructblip.models.released import get_variant
from jax_instructblip.training.objective import check_parts
from jax_instructblip.training.pair_objective import PairObjective, draw_negatives, same_pairs
from tests.helpers.interpreter import run_python


def draw(similarities, same, count=300):
    both = (jnp.asarray(similarities), jnp.asarray(similarities).T)
    keys = jax.random.split(jax.random.key(0), count)
    texts, images = jax.vmap(lambda key: draw_negatives(key, both, same))(keys)
    return np.asarray(texts), np.asarray(images)


def test_a_negative_is_never_a_right_pair_and_the_nearer_the_likelier():
    similarities = np.array([[9.0, 2.0, 0.0], [0.0, 9.0, 0.0], [0.0, 1.0, 9.0]])
    texts, images = draw(similarities, same_pairs(jnp.arange(3)))
    for drawn in (texts, images):
        assert all((drawn[:, row] != row).all() for row in range(3))
    chosen = (texts[:, 0] == 1).mean()
    assert chosen == pytest.approx(np.exp(2) / (np.exp(2) + 1), abs=0.06)
    assert (images[:, 1] == 0).mean() == pytest.approx(np.exp(2) / (np.exp(2) + np.e), abs=0.08)


def test_captions_of_the_same_image_are_no_negatives():
    texts, images = draw(np.zeros((4, 4)), same_pairs(jnp.array([7, 8, 7, 9])))
    for drawn in (texts, images):
        assert set(drawn[:, 0]) == set(drawn[:, 2]) == {1, 3}
        assert set(drawn[:, 1]) == {0, 2, 3}


def test_where_all_are_alike_some_pair_is_drawn_and_the_loss_is_finite():
    texts, _ = draw(np.zeros((3, 3)), same_pairs(jnp.zeros(3)))
    assert set(texts[:, 0]) == {0, 1, 2}


def test_the_draw_is_a_function_of_the_key():
    both = (jnp.zeros((5, 5)),) * 2
    same = same_pairs(jnp.arange(5))
    first, again = (draw_negatives(jax.random.key(3), both, same) for _ in "ab")
    other = draw_negatives(jax.random.key(4), both, same)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("settings", "how"), [((2, False), "accumulate"), ((1, True), "pmap")])
def test_a_batch_cannot_be_divided(settings, how):
    objective = PairObjective(Blip2(get_variant("tiny-stage1")))
    accumulate, mapped = settings
    with pytest.raises(ValueError, match=f"{how}.*each pair is compared with all others"):
        check_parts(objective, accumulate=accumulate, mapped=mapped)


MESHES = """
import dataclasses, json
import jax, jax.numpy as jnp, numpy as np
from jax_instructblip.checkpoint import flatten
from jax_instructblip.models.blip2 import Blip2, init_params
from jax_instructblip.models.released import get_variant
from jax_instructblip.parallel import rules
from jax_instructblip.parallel.mesh import batch_sharding, make_mesh
from jax_instructblip.training.pair_objective import PairObjective
from jax_instructblip.training.state import partition

B, L = 40, 12
variant = get_variant("tiny-stage1").replace(**{"qformer.vocab": 64, "qformer.dropout": 0.0})
params = init_params(variant, jax.random.key(0))
rng = np.random.default_rng(0)
batch = {
    "images": rng.integers(0, 255, (B, 1, 56, 56, 3)).astype(np.uint8),
    "captions": rng.integers(5, 63, (B, L)).astype(np.int32),
    "caption_mask": np.arange(L) < rng.integers(4, L + 1, (B, 1)),
    "image_id": rng.integers(0, 30, B).astype(np.int32),
}
objective = PairObjective(Blip2(variant), by_image=True)
found, program = {}, ""
for sizes in ((1, 1, 1), (4, 1, 1), (2, 2, 2)):
    count = int(np.prod(sizes))
    mesh = make_mesh(*sizes, jax.devices()[:count])
    trained, frozen = partition(params, ("qformer", "heads"))
    placed = jax.device_put(trained, rules.shardings(trained, mesh))
    rest = jax.device_put(frozen, rules.shardings(frozen, mesh))
    rows = jax.device_put(batch, batch_sharding(mesh))

    def loss(trained, frozen, rows):
        totals = objective.totals(rows)
        return objective({**frozen, **trained}, rows, jax.random.key(5), totals)

    with jax.set_mesh(mesh):
        graded = jax.jit(jax.value_and_grad(loss, has_aux=True))
        compiled = graded.lower(placed, rest, rows).compile()
        (value, terms), gradient = compiled(placed, rest, rows)
    if sizes == (4, 1, 1):
        program = compiled.as_text()
    leaves = {name: np.asarray(leaf) for name, leaf in flatten(gradient).items()}
    if not found:
        first, losses = leaves, {}
        found["moved"] = float(max(np.abs(leaf).max() for leaf in leaves.values()))
    far = max(np.abs(leaves[name] - first[name]).max() for name in first)
    found[str(sizes)] = [float(value), *map(float, terms.values()), float(far)]
found["local"] = f"f32[{B // 4},{B}]" in program
found["global"] = f"f32[{B},{B}]" in program
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def meshes():
    return json.loads(run_python(MESHES, devices=8).splitlines()[-1])


def test_losses_and_gradients_do_not_depend_on_the_mesh(meshes):
    value, itc, itm, itg, _ = meshes["(1, 1, 1)"]
    assert value == pytest.approx(itc + itm + itg, abs=1e-5) and meshes["moved"] > 1
    assert min(itc, itm, itg) > 0.1
    for sizes in ("(4, 1, 1)", "(2, 2, 2)"):
        *values, far = meshes[sizes]
        assert values == pytest.approx([value, itc, itm, itg], abs=1e-5), sizes
        assert far < 1e-5 * meshes["moved"], sizes  # the largest entry of the gradient


def test_a_device_holds_the_similarities_of_its_own_rows(meshes):
    assert meshes["local"] and not meshes["global"]
