"""LLaVA's folders of Hugging Face: logits and answers beside transformers, and the way back."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip import convert, export
from jax_instructblip.conversion.export import export_hf
from jax_instructblip.conversion.hf_folder import convert_hf, read_hf
from jax_instructblip.conversion.safetensors import ConversionError
from jax_instructblip.conversion.stored_model import read_stored_model
from jax_instructblip.inference.loading import read_source
from jax_instructblip.models.vlm import VisionLanguageModel
from tests.conversion.test_export import assert_same_tensors, load_in_transformers
from tests.helpers import hf_folders
from tests.helpers.golden_blip2 import normalised
from tests.helpers.llava_folders import batch_of, draw_conversations, write_llava
from tests.helpers.numerics import error

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")

NEW = 6
LLAVA = "LlavaForConditionalGeneration"
CASES = [("llama", True), ("llama", False), ("llama3", False), ("mistral", True)]
CASES += [("qwen2", True), ("qwen3", False)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{1 if case[1] else 2}")
def pair(request, tmp_path_factory):
    kind, linear = request.param
    folder = tmp_path_factory.mktemp("llava") / kind
    theirs = write_llava(folder, kind, linear)
    variant, params = read_hf(folder)
    params, model = jax.tree.map(jnp.asarray, params), VisionLanguageModel(variant)

    @jax.jit
    def prefill(batch):
        return model.apply({"params": params}, batch, NEW, method="prefill")

    @jax.jit
    def step(token, cache):
        return model.apply({"params": params}, token, cache, method="decode_step")

    return types.SimpleNamespace(
        folder=folder,
        linear=linear,
        theirs=theirs,
        image=theirs.config.image_token_index,
        variant=variant,
        params=params,
        whole=jax.jit(lambda batch: model.apply({"params": params}, batch)),
        prefill=prefill,
        step=step,
    )


def test_logits_padded_or_not(pair):
    rows, images = draw_conversations(4, pair.variant.llm.vocab, pair.image)
    found = np.asarray(pair.whole(batch_of(rows, images, pair.image)))
    longest = max(map(len, rows))
    with torch.no_grad():
        padded = pair.theirs(
            input_ids=torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows]),
            attention_mask=torch.tensor(
                [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
            ),
            pixel_values=torch.tensor(normalised(images)),
        ).logits.numpy()
        for row, ids in enumerate(rows):
            alone = pair.theirs(
                input_ids=torch.tensor([ids]),
                pixel_values=torch.tensor(normalised(images[row : row + 1])),
            ).logits[0]
            assert error(found[row, : len(ids)], alone.numpy()) < 1e-4
            assert error(found[row, : len(ids)], padded[row, : len(ids)]) < 1e-4
    other = pair.whole(batch_of(rows, images[::-1], pair.image))
    assert error(other, found) > 1e-2  # the image counts


def test_greedy_tokens_of_twenty_prompts(pair):
    rows, images = draw_conversations(20, pair.variant.llm.vocab, pair.image, seed=1)
    batch = batch_of(rows, images, pair.image)
    del batch["asked"]
    logits, cache = pair.prefill(batch)
    found = [np.asarray(logits).argmax(-1)]
    for _ in range(NEW - 1):
        logits, cache = pair.step(jnp.asarray(found[-1]), cache)
        found.append(np.asarray(logits).argmax(-1))
    pair.theirs.generation_config.eos_token_id = None
    for row, answer in enumerate(np.concatenate(found, axis=1)):
        prompt = torch.tensor([rows[row]])
        with torch.no_grad():
            made = pair.theirs.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                pixel_values=torch.tensor(normalised(images[row : row + 1])),
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
            )
        assert answer.tolist() == made[0, prompt.shape[1] :].tolist()


def test_gradients_of_the_projector(pair):
    """The loss is the sum of squared logits, which depends on every slot."""
    rows, images = draw_conversations(3, pair.variant.llm.vocab, pair.image)
    batch = jax.tree.map(jnp.asarray, batch_of(rows, images, pair.image))
    model = VisionLanguageModel(pair.variant)
    valid = (batch["segments"] > 0)[..., None]

    @jax.jit
    @jax.grad
    def gradient(projector):
        logits = model.apply({"params": {**pair.params, "projector": projector}}, batch)
        return jnp.where(valid, logits**2, 0).sum() / 1000

    found = gradient(pair.params["projector"])
    pair.theirs.zero_grad()
    for row, ids in enumerate(rows):
        pixels = torch.tensor(normalised(images[row : row + 1]))
        logits = pair.theirs(input_ids=torch.tensor([ids]), pixel_values=pixels).logits
        ((logits**2).sum() / 1000).backward()
    theirs = pair.theirs.model.multi_modal_projector
    layers = {"in": theirs.linear_1} | ({} if pair.linear else {"out": theirs.linear_2})
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        assert error(found[name]["kernel"], layer.weight.grad.numpy().T) < 1e-4
        assert error(found[name]["bias"], layer.bias.grad.numpy()) < 1e-4


def test_there_and_back_no_bit_changes(pair, tmp_path):
    ours = convert(pair.folder, tmp_path / "ours")
    back = export(ours, tmp_path / "back")
    assert_same_tensors(back, pair.folder)
    again = load_in_transformers(back, LLAVA)
    for name, leaf in pair.theirs.state_dict().items():
        assert torch.equal(leaf, again.state_dict()[name]), name
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (pair.folder, back)
    )
    assert after == before
    stored = json.loads((back / "processor_config.json").read_text())
    assert stored["processor_class"] == "LlavaProcessor" and stored["patch_size"] == 7
    assert stored["num_additional_image_tokens"] == 1
    variant = read_source(ours).variant
    assert variant == pair.variant and variant.bridge.layers == (1 if pair.linear else 2)
    # Rows that no token has are kept; the last block and the norm are stored and not computed.
    assert variant.llm.vocab == pair.theirs.config.text_config.vocab_size
    assert (variant.vision.layers, variant.vision.computed_layers) == (4, 3)


SPELLINGS = {  # of the four pieces: the language model's, its head, the image tower's, projector
    "released": ("language_model.model.", "language_model.", "vision_tower.vision_model.", ""),
    "4.52": ("model.language_model.", "", "model.vision_tower.vision_model.", "model."),
    "memory": ("model.language_model.", "", "model.vision_tower.", "model."),
    "mixed": ("language_model.model.", "language_model.", "vision_tower.", ""),
}


NAMES = {
    "released": {"language_model.lm_head.weight", "language_model.model.norm.weight"},
    "4.52": {"lm_head.weight", "model.vision_tower.vision_model.pre_layrnorm.bias"},
    "memory": {"model.vision_tower.pre_layrnorm.bias", "model.language_model.norm.weight"},
    "mixed": {"vision_tower.pre_layrnorm.bias", "language_model.model.norm.weight"},
}


def respell(spelling):
    """Renames the tensors that transformers 5 writes, those of "mixed"."""

    text, head, vision, bridge = SPELLINGS[spelling]

    def change(state):
        for name in list(state):
            tensor, new = state.pop(name), name
            for old, words in (
                ("language_model.model.", text),
                ("language_model.lm_head.", f"{head}lm_head."),
                ("vision_tower.", vision),
                ("multi_modal_projector.", f"{bridge}multi_modal_projector."),
            ):
                if name.startswith(old):
                    new = words + name.removeprefix(old)
            state[new] = tensor

    return change


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear") / "llama"
    write_llava(folder, "llama", linear=True)
    return folder


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_of_every_version_are_read(linear, tmp_path, spelling):
    folder = hf_folders.copy(linear, tmp_path / "other", change=respell(spelling))
    assert hf_folders.tensors(folder).keys() >= NAMES[spelling]
    (variant, params), (known, expected) = read_hf(folder), read_hf(linear)
    assert variant == known
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    back = export(convert(folder, tmp_path / "ours"), tmp_path / "back")
    assert_same_tensors(back, folder)  # under the names that they had
    load_in_transformers(back, LLAVA)


def test_a_tensor_under_two_names_is_refused(linear, tmp_path):
    def double(state):
        state["lm_head.weight"] = state["language_model.lm_head.weight"].clone()

    folder = hf_folders.copy(linear, tmp_path / "double", change=double)
    with pytest.raises(ConversionError, match="twice(.|\n)*language_model.lm_head.weight and lm"):
        convert_hf(folder)


def test_two_linear_layers_that_are_not_one_are_refused(linear, tmp_path):
    def scale(state):
        state["multi_modal_projector.linear_2.weight"] *= 2
        state["multi_modal_projector.linear_2.bias"] += 1

    folder = hf_folders.copy(linear, tmp_path / "scaled", change=scale)
    with pytest.raises(ConversionError) as caught:
        convert_hf(folder)
    assert len(caught.value.failures) == 2
    assert "linear_2.bias: expected zeros, found others: with proj" in caught.value.failures[0]
    assert "linear_2.weight: expected identity, found others" in caught.value.failures[1]


def test_an_identity_between_gelu_stays_a_layer(linear, tmp_path):
    """The activation says how many layers there are, not the numbers."""
    change = lambda config: config.update(projector_hidden_act="gelu")
    folder = hf_folders.copy(linear, tmp_path / "gelu", config=change)
    assert convert_hf(folder).variant.bridge.layers == 2


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("", "projector_hidden_act", "silu", "projector_hidden_act is 'silu', expected one of l"),
        ("", "vision_feature_layer", -1, "vision_feature_layer is -1; supported: -2"),
        ("", "vision_feature_layer", [-2, -5], r"vision_feature_layer is \[-2, -5\]; supported"),
        ("", "vision_feature_select_strategy", "full", "is 'full'; supported: 'default'"),
        ("", "multimodal_projector_bias", False, "projector_bias is False; supported: True"),
        ("vision_config", "model_type", "siglip_vision_model", "'siglip_vision_model'; supported"),
        ("vision_config", "hidden_act", "silu", "vision_config.hidden_act is 'silu', expected"),
        ("text_config", "model_type", "gemma", "supported language models: llama, mistral, qwen2"),
    ],
)
def test_what_is_not_llava_is_refused_by_name(linear, tmp_path, section, key, value, said):
    def change(config):
        (config[section] if section else config)[key] = value

    folder = hf_folders.copy(linear, tmp_path / "changed", config=change)
    with pytest.raises(ConversionError, match=said):
        convert_hf(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"do_pad": "yes"}, "do_pad is 'yes'; supported: False"),
        ({"do_center_crop": False}, "do_center_crop is False; supported: True"),
        ({"size": {"height": 28, "width": 28}}, "size is .*; supported: {'shortest_edge': 28}"),
    ],
)
def test_images_prepared_otherwise_are_refused(linear, tmp_path, change, said):
    folder = hf_folders.copy(linear, tmp_path / "changed")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConversionError, match=said):
        convert_hf(folder)


def test_a_projector_of_another_width_is_named(linear, tmp_path):
    def narrow(state):
        name = "multi_modal_projector.linear_1.weight"
        state[name] = state[name][:, :-1].clone()

    folder = hf_folders.copy(linear, tmp_path / "narrow", change=narrow)
    with pytest.raises(ConversionError, match=r"linear_1.weight: for projector/in/kernel: exp"):
        convert_hf(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_identity_is_exact_in_narrow_dtypes(linear, tmp_path, dtype):
    def narrow(state):
        for name, tensor in state.items():
            state[name] = tensor.to(getattr(torch, dtype))

    folder = hf_folders.copy(linear, tmp_path / "narrow", change=narrow)
    ours = convert(folder, tmp_path / "ours")
    assert_same_tensors(export(ours, tmp_path / "back"), folder)


def test_the_released_names(forge, tmp_path):
    """The folder of the network in memory, without tokenizer; a fresh export has released names."""
    folder = hf_folders.copy(forge("llava-7b"), tmp_path / "forged")
    for path in (*folder.glob("token*"), folder / "preprocessor_config.json"):
        path.unlink()
    ours = convert(folder, tmp_path / "ours")
    assert_same_tensors(export(ours, tmp_path / "back"), folder)
    fresh = tmp_path / "fresh"
    export_hf(dataclasses.replace(read_stored_model(ours), facts={}), fresh)
    assert hf_folders.tensors(fresh).keys() >= NAMES["released"]
    found = load_in_transformers(fresh, LLAVA).state_dict()
    expected = load_in_transformers(folder, LLAVA).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
