"""CLIP ViT-L's tower against transformers in float32, through the table of OpenAI's file."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip import checkpoint
from jax_instructblip.conversion.engine import make_plan
from jax_instructblip.conversion.lavis import VISION, open_lavis
from jax_instructblip.conversion.tables import vision
from jax_instructblip.models.vision import VisionBlock, VisionTransformer
from tests.helpers.golden_blip2 import normalised
from tests.helpers.numerics import error

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
clip = pytest.importorskip("tests.helpers.clip", reason="needs torch: pip install -e .[torch]")

LAYER, TOWER = 1e-5, 1e-4  # parts of the largest value
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), np.uint8)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """Our parameters, and the states of transformers: after the first norm, then of each block."""
    model, path = clip.theirs(), tmp_path_factory.mktemp("clip") / "clip_vit_L.pth"
    torch.save(clip.openai_tensors(model), path)
    after = ("transformer.resblocks.3.", "ln_post.", "proj")
    tensors = {
        name: tensor
        for name, tensor in open_lavis(path).items()
        if not name.removeprefix(VISION).startswith(after)
    }
    module = VisionTransformer(clip.SIZES, jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), PIXELS)["params"]
    expected = checkpoint.flatten({"vision": shapes})
    leaves = make_plan(vision.openai_rules(clip.SIZES), tensors, expected, "CLIP")
    with torch.no_grad():
        states = model(torch.tensor(normalised(PIXELS)), output_hidden_states=True).hidden_states
    params = checkpoint.unflatten({path: jnp.asarray(leaf) for path, leaf in leaves})["vision"]
    return types.SimpleNamespace(
        module=module, params=params, states=np.stack([each.numpy() for each in states])
    )


def test_layers(tower):
    block = VisionBlock(clip.SIZES, jnp.float32)
    apply = jax.jit(jax.vmap(lambda params, x: block.apply({"params": params}, x, None)[0]))
    found = apply(tower.params["layers"], jnp.asarray(tower.states[:3]))
    for layer, expected in enumerate(tower.states[1:4]):
        assert error(found[layer], expected) < LAYER


def test_all_tokens_before_the_last_block(tower):
    found = jax.jit(tower.module.apply)({"params": tower.params}, PIXELS)
    assert found.shape == (2, 17, 48)
    assert error(found, tower.states[-2]) < TOWER
    assert error(found, tower.states[-1]) > 0.1
