"""Against transformers in float32: layers from the same input, then towers, then the loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.models.llama import LlamaLayer, frequencies, rotary
from jax_instructblip.models.masks import causal_mask, padding_mask
from jax_instructblip.models.qformer import QFormerLayer
from jax_instructblip.models.t5 import T5Layer, T5Stack
from jax_instructblip.models.vision import VisionBlock
from jax_instructblip.models.vlm import VisionLanguageModel
from tests.helpers import stages, towers
from tests.helpers.numerics import error

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")

LAYER, TOWER, LOSS = 1e-5, 1e-4, 1e-5  # parts of the largest value; the loss absolutely

# Layers on the sizes that differ in every field, whole towers on all.
every_folder = pytest.mark.parametrize("name", towers.FOLDERS)
odd_folders = pytest.mark.parametrize("name", ["t5-odd", "vicuna-odd"])


def through(layer, params, inputs, *rest, **keywords):
    """`layer` from each of the stacked inputs, with the parameters of its place in the stack."""

    def one(params, x):
        made = layer.apply({"params": params}, x, *rest, **keywords)
        return made[0] if isinstance(made, tuple) else made

    return jax.jit(jax.vmap(one))(params, inputs)


def test_vision_layers(read_pair):
    pair = read_pair("t5-odd")
    inputs, expected = towers.layers(pair.theirs[1], "vision_model.encoder.layers")
    params = pair.params["vision"]["layers"]
    found = through(VisionBlock(pair.variant.vision, jnp.float32), params, inputs, None)
    assert error(found, expected) < LAYER


@pytest.mark.parametrize("start, kind", [(0, "cross"), (1, "plain")])
def test_qformer_layers(read_pair, start, kind):
    pair, (_, seen) = read_pair("t5-odd"), read_pair("t5-odd").theirs
    inputs, expected = towers.layers(seen, "qformer.encoder.layer", 2, start)
    image = jnp.asarray(seen["vision_model.post_layernorm"][1])
    config = pair.variant.qformer
    text = pair.batch["qformer_mask"][:, 0]
    valid = np.pad(text, ((0, 0), (config.queries, 0)), constant_values=True)
    params = pair.params["qformer"]["layers"][kind]
    layer = QFormerLayer(config, jnp.float32, cross=kind == "cross")
    mask = padding_mask(jnp.asarray(valid))
    found = through(layer, params, inputs, None, mask, image, config.queries, False)
    assert error(found, expected) < LAYER


@pytest.mark.parametrize("tower", ["encoder", "decoder"])
def test_t5_layers(read_pair, tower):
    pair, (_, seen) = read_pair("t5-odd"), read_pair("t5-odd").theirs
    config, params = pair.variant.llm, pair.params["llm"][tower]
    inputs, expected = towers.layers(seen, f"language_model.{tower}.block")
    index = jnp.arange(inputs.shape[2])
    stack = T5Stack(config, jnp.float32, decoder=tower == "decoder")
    bias = stack.apply({"params": params}, index[None] - index[:, None], method="bias")[None]
    valid = pair.batch["segments"] > 0
    rest = [padding_mask(jnp.asarray(valid)), bias, None, None]
    if tower == "decoder":
        causal = causal_mask(jnp.ones(inputs.shape[1:3], jnp.int32))
        encoded = jnp.asarray(seen["language_model.encoder.final_layer_norm"][1])
        rest = [causal, bias, encoded, rest[0]]
    layer = T5Layer(config, jnp.float32, decoder=tower == "decoder")
    found = through(layer, params["layers"], inputs, None, *rest, False)
    assert error(found, expected) < LAYER


def test_llama_layers(read_pair):
    pair, (_, seen) = read_pair("vicuna-odd"), read_pair("vicuna-odd").theirs
    config = pair.variant.llm
    inputs, expected = towers.layers(seen, "language_model.model.layers")
    valid = pair.batch["segments"] > 0
    positions = jnp.arange(inputs.shape[2])[None]
    rotation = rotary(positions, frequencies(config), jnp.float32)
    rest = None, causal_mask(jnp.asarray(pair.batch["segments"])), rotation, False, False
    params = pair.params["llm"]["layers"]
    found = through(LlamaLayer(config, jnp.float32), params, inputs, *rest)
    for row, kept in enumerate(valid):  # what padding computes is of no interest
        assert error(found[:, row, kept], expected[:, row, kept]) < LAYER


@every_folder
def test_towers_logits_and_loss(read_pair, name):
    pair = read_pair(name)
    (out, seen), ((loss, made), _) = pair.theirs, pair.ours
    queries = pair.variant.visual_tokens
    assert error(made["features"], seen["vision_model.post_layernorm"][0]) < TOWER
    assert error(made["image_norm"], seen["vision_model.post_layernorm"][1]) < TOWER
    assert error(made["queries"], seen["qformer"][1][:, :queries]) < TOWER
    assert error(made["prompt"][:, :queries], seen["language_projection"][1]) < TOWER
    logits = out.logits.detach().numpy()
    if pair.kind == "t5":
        encoded = seen["language_model.encoder.final_layer_norm"][1]
        valid = pair.batch["segments"] > 0
        assert error(np.asarray(made["encoded"])[valid], encoded[valid]) < TOWER
        asked = pair.batch["targets"] != towers.IGNORE
    else:
        logits, asked = logits[:, queries:], pair.batch["segments"][:, queries:] > 0
    assert error(np.asarray(made["logits"])[asked], logits[asked]) < TOWER
    assert abs(loss - out.loss.item()) < LOSS


@odd_folders
def test_the_odd_folders_differ_from_the_release(read_pair, name):
    """Every field that a source may set differently is one these folders do set differently."""
    variant = read_pair(name).variant
    assert variant.vision.norm_eps == variant.qformer.image_norm_eps == 1e-5
    assert variant.qformer.norm_eps == 1e-7
    if variant.llm.kind == "t5":
        assert variant.llm.activation == "gelu_new" and variant.llm.scale_decoder_outputs
        assert variant.llm.width != variant.llm.heads * variant.llm.head_width
        assert (variant.llm.relative_buckets, variant.llm.relative_max_distance) == (12, 20)
    assert variant.llm.norm_eps == 1e-5


@pytest.mark.parametrize("name, eps, other", [("t5-forged", 1e-6, 1e-5), ("t5-odd", 1e-5, 1e-6)])
def test_the_image_norm_has_the_eps_of_its_folder(read_pair, name, eps, other):
    """The norm is seen through the Q-Former, on features whose variance is near either eps."""
    pair = read_pair(name)
    config, params = pair.variant.qformer, pair.params["qformer"]
    random = np.random.default_rng(0)
    faint = 1e-3 * random.standard_normal((3, 5, config.vision_width), np.float32)
    text = pair.inputs()["qformer_input_ids"][:, :3]
    with torch.no_grad():
        expected = pair.torch.qformer(
            input_ids=text,
            query_embeds=pair.torch.query_tokens.expand(3, -1, -1),
            encoder_hidden_states=pair.torch.vision_model.post_layernorm(torch.tensor(faint)),
        )[0][:, : config.queries]

    def look(eps):
        changed = dataclasses.replace(config, image_norm_eps=eps)
        text_of_ours = jnp.asarray(text.numpy()), jnp.ones(text.shape, bool)
        see = jax.jit(
            lambda params, faint: stages.query_outputs(changed, params, faint, *text_of_ours)
        )
        return error(see(params, faint), expected)

    assert config.image_norm_eps == eps
    assert look(eps) < TOWER
    assert look(other) > 0.01


def test_qformer_without_instruction(read_pair):
    pair, (_, seen) = read_pair("t5-odd"), read_pair("t5-odd").theirs
    image = seen["vision_model.post_layernorm"][0]
    normed = torch.tensor(seen["vision_model.post_layernorm"][1])
    with torch.no_grad():
        queries = pair.torch.query_tokens.expand(len(image), -1, -1)
        expected = pair.torch.qformer(
            input_ids=None, query_embeds=queries, encoder_hidden_states=normed
        )[0]
    config = dataclasses.replace(pair.variant.qformer, instruction_aware=False)
    look = jax.jit(lambda params, image: stages.query_outputs(config, params, image))
    params = towers.without_text(pair.params["qformer"])
    assert error(look(params, jnp.asarray(image)), expected.numpy()) < TOWER


@odd_folders
def test_prefill_and_steps(read_pair, name):
    """Two cached steps with the next tokens of a longer row that transformers reads whole."""
    pair = read_pair(name)
    model = VisionLanguageModel(pair.variant)
    queries, tokens = pair.variant.visual_tokens, np.array([[7, 11], [8, 12], [9, 13]])
    prefill = jax.jit(
        lambda params, batch: model.apply({"params": params}, batch, 2, method="prefill")
    )
    step = jax.jit(
        lambda params, token, cache: model.apply(
            {"params": params}, token, cache, method="decode_step"
        )
    )
    logits, cache = prefill(pair.params, pair.batch)
    found = [logits]
    for token in tokens.T:
        logits, cache = step(pair.params, token[:, None], cache)
        found.append(logits)
    found = np.concatenate(found, axis=1)

    given = {key: leaf for key, leaf in pair.inputs().items() if key != "labels"}
    with torch.no_grad():
        if pair.kind == "t5":
            start = np.pad(tokens, ((0, 0), (1, 0)))
            expected = pair.torch(**given, decoder_input_ids=torch.tensor(start)).logits.numpy()
            assert error(found, expected) < TOWER
            return
        lengths = given["attention_mask"].sum(1)
        for key, fill in (("input_ids", 0), ("attention_mask", 0)):
            given[key] = torch.nn.functional.pad(given[key], (0, 2), value=fill)
        for row, length in enumerate(lengths):
            given["input_ids"][row, length : length + 2] = torch.tensor(tokens[row])
            given["attention_mask"][row, length : length + 2] = 1
        whole = pair.torch(**given).logits.numpy()
    for row, length in enumerate(lengths):
        assert length > queries
        assert error(found[row], whole[row, length - 1 : length + 2]) < TOWER
