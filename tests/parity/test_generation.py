"""Answers against the original code's recorded ones and against transformers."""

import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_instructblip
from jax_instructblip.inference.decode import generate_tokens
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.sampling import TracedSettings, truncate
from jax_instructblip.models.variants import IMAGE_MEAN, IMAGE_STD
from jax_instructblip.models.vlm import VisionLanguageModel
from tests.helpers import golden

# The recorded `min_length` 8 counts T5's start id, and the first id of transformers 4.33.2 that the
# decoder-only models never embed: 7 new tokens.
SETTINGS = {
    "greedy": {},
    "greedy_rep1.5": {"repetition_penalty": 1.5},
    "greedy_min8": {"min_new_tokens": 7},
}
CASES = ("instruct_t5", "instruct_vicuna")


@pytest.fixture(scope="module", params=CASES)
def case(request, shared):
    return request.param


@pytest.fixture(scope="module")
def model(case):
    return VisionLanguageModel(golden.variant(case)), golden.params(case)


def assert_same_answers(model, made, recorded):
    """`recorded` starts with the id before the first new one, and is padded with 0."""
    eos = model.variant.llm.eos_id
    for tokens, length, row in zip(made["tokens"], made["lengths"], recorded[:, 1:], strict=True):
        row = list(row)
        row = row[: row.index(eos) + 1] if eos in row else row
        assert list(tokens[0][: length[0]]) == row


@pytest.mark.parametrize(
    ("tag", "setting"),
    [*(("generate", each) for each in SETTINGS), ("generate_video", "greedy")],
)
def test_greedy_answers_are_those_of_the_original_code(case, model, tag, setting):
    recorded = golden.outputs(case)[f"{tag}/{setting}/ids"]
    count = 12 if case == "instruct_t5" else 11  # max_length 12 counts that first id too
    made = generate_tokens(
        *model,
        golden.batch(case, tag),
        jax.random.split(jax.random.key(0), len(recorded)),
        GenerationConfig(max_new_tokens=count, **SETTINGS[setting]),
    )
    assert_same_answers(model[0], jax.tree.map(np.asarray, made), recorded)


NEW = 12  # tokens of an answer
SIDE = 56  # pixels
PROMPTS = [
    "What is this?",
    "Why?",
    "Describe the image.",
    "Question: how many dogs are there in the picture? Short answer:",
    "Is the man to the left of the red car",
    "a photo of",
    "Which of these is in the image: (a) a bird, (b) a tree, (c) a boat, (d) a horse? Answer:",
    "Write a short description for the image.",
    "What does the sign say?",
    "colour",
    "Given the image, answer the following question with no more than three words. Is it raining?",
    "Who made this?",
    "Use a few words to illustrate what is happening in the picture.",
    "Where",
    "How many people are wearing hats, and how many of them are standing beside the long table?",
    "Question: What time of the day is it? Answer:",
    "The question that this image answers with yes is",
    "What is the weather like, and why do you think so?",
    "Is this a picture of a kitchen? yes or no",
    " ".join(["Please look at every part of the picture before you answer."] * 12),
]


@pytest.mark.parametrize("variant", ["instructblip-flan-t5-xl", "instructblip-vicuna-7b"])
def test_greedy_answers_are_those_of_transformers(variant, forge, tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for _ in PROMPTS]
    for seed in range(3):
        folder = reseeded(forge(variant), tmp_path / str(seed), seed)
        blip = jax_instructblip.load(folder, dtype=jnp.float32)
        settings = {"max_new_tokens": NEW, "batch_size": len(PROMPTS)}
        found = blip.generate(images, PROMPTS, **settings)
        expected = answers_of_transformers(folder, images, blip.variant.llm)
        assert [list(answer.tokens) for answer in found] == expected
        assert len({answer.tokens for answer in found}) == len(PROMPTS)  # not all the same


def reseeded(folder, out, seed):
    """A copy of a forged folder, tokenizers too, with weights of another seed."""
    from tests.helpers import towers

    shutil.copytree(folder, out)
    shapes = {name: leaf.shape for name, leaf in load_file(out / towers.WEIGHTS).items()}
    save_file(towers.draw(shapes, seed), out / towers.WEIGHTS, {"format": "pt"})
    return out


def answers_of_transformers(folder, images, llm, prompts=PROMPTS, **settings):
    """New ids of each answer, up to eos, of one batch in which prompts are padded as released.

    Greedy, unless `settings` of `generate` say otherwise.
    """
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    transformers = pytest.importorskip("transformers")
    tokenizers = {
        "t5": (transformers.T5Tokenizer, "right"),
        "llama": (transformers.LlamaTokenizer, "left"),
    }
    own, side = tokenizers[llm.kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' own doing
        network = transformers.InstructBlipForConditionalGeneration.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        ).eval()
        text = own.from_pretrained(folder, padding_side=side)(
            prompts, padding=True, return_tensors="pt"
        )
        bert = transformers.BertTokenizer.from_pretrained(
            folder / "qformer_tokenizer", truncation_side="left"
        )(prompts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        # The processor's layout: the placeholders of the image before everything, padding too.
        config = network.config
        seen = torch.full((len(prompts), config.num_query_tokens), config.image_token_index)
        pixels = (np.stack(images) / 255 - IMAGE_MEAN) / IMAGE_STD
        made = network.generate(
            pixel_values=torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2),
            qformer_input_ids=bert.input_ids,
            qformer_attention_mask=bert.attention_mask,
            input_ids=torch.cat([seen, text.input_ids], dim=1),
            attention_mask=torch.cat([torch.ones_like(seen), text.attention_mask], dim=1),
            **{"do_sample": False, "num_beams": 1, "max_new_tokens": NEW} | settings,
        )
    # transformers 5 returns the prompt of a decoder-only model too, and the start id of T5.
    start = 1 if llm.kind == "t5" else seen.shape[1] + text.input_ids.shape[1]
    rows = made[:, start:].tolist()
    return [row[: row.index(llm.eos_id) + 1] if llm.eos_id in row else row for row in rows]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_truncation_is_that_of_transformers(temperature, top_k, top_p):
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    from transformers.generation import logits_process as their

    scores = np.random.default_rng(0).normal(0, 2, (16, 50)).astype(np.float32)
    scores = np.sort(scores)[:, ::-1].copy()
    expected = their.TemperatureLogitsWarper(temperature)(None, torch.tensor(scores))
    if top_k:
        expected = their.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = their.TopPLogitsWarper(top_p)(None, expected)
    settings = TracedSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    found = truncate(jnp.array(scores), settings)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
