import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.models.projector import Projector
from jax_instructblip.models.variants import ProjectorConfig, Variant
from jax_instructblip.models.vlm import VisionLanguageModel, param_shapes
from tests.helpers.numerics import error, random_params
from tests.helpers.rows import lay_out
from tests.helpers.tiny import tiny_variant

PATCHES = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 6), np.float32))


def projected(layers: int = 2) -> Variant:
    known = tiny_variant("llama")
    bridge = ProjectorConfig(known.vision.width, known.llm.width, layers)
    return Variant("llava", known.vision, bridge, known.llm)


@pytest.mark.parametrize("layers", [1, 2])
def test_each_patch_but_cls_becomes_a_vector(layers):
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    module = Projector(ProjectorConfig(6, 8, layers), jnp.float32)
    params = module.init(jax.random.key(0), PATCHES)["params"]
    found = module.apply({"params": params}, PATCHES)
    assert found.shape == (2, 4, 8)
    x = torch.tensor(np.asarray(PATCHES[:, 1:]))
    for name in ("in", "out")[:layers]:
        kernel, bias = (torch.tensor(np.asarray(params[name][key])) for key in ("kernel", "bias"))
        x = torch.nn.functional.gelu(x) if name == "out" else x
        x = x @ kernel + bias
    assert error(found, x.numpy()) < 1e-5


def test_a_model_with_a_projector_answers():
    """The page is the same: other parameters, no instruction for the bridge."""
    variant = projected()
    assert set(param_shapes(variant)) == {"vision", "projector", "llm"}
    params = jax.tree.map(jnp.asarray, random_params(variant))
    rng = np.random.default_rng(0)
    given = {
        "images": rng.integers(0, 256, (2, 1, 28, 28, 3)).astype(np.uint8),
        "tokens": rng.integers(3, 50, (2, 6)),
        "mask": np.ones((2, 6), bool),
    }
    batch = jax.tree.map(jnp.asarray, lay_out(variant, given))
    model = VisionLanguageModel(variant)
    logits = jax.jit(model.apply)({"params": params}, batch)
    assert logits.shape == (2, 6, variant.llm.vocab)
    first, _ = model.apply({"params": params}, batch, 2, method="prefill")
    assert error(first[:, 0], logits[:, -1]) < 1e-5
    darker = {**batch, "images": batch["images"] // 2}
    assert error(jax.jit(model.apply)({"params": params}, darker), logits) > 1e-3
