"""Hugging Face's folders of BLIP-2's second stage: logits and answers beside transformers."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_instructblip
from jax_instructblip.data.batch import collate
from jax_instructblip.inference.batching import ask_every_slot
from tests.conversion.test_export import assert_same_tensors, load_in_transformers
from tests.helpers import golden_blip2
from tests.helpers.numerics import error

SECOND = "Blip2ForConditionalGeneration"
PROMPTS = ["a photo of", "Question: what color is the dog? Short answer:", "Why?"]
NEW = 8


@pytest.fixture(scope="module", params=["blip2-opt-2.7b", "blip2-flan-t5-xl"])
def pair(request, forge):
    folder = forge(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = load_in_transformers(folder, SECOND).eval()
    return folder, jax_instructblip.load(folder, dtype=jnp.float32), theirs


def pictures(blip):
    size = blip.variant.vision.image_size
    return np.random.default_rng(0).integers(0, 256, (len(PROMPTS), size, size, 3), np.uint8)


def given_to_theirs(blip, theirs, prompts, images, left):
    """The processor's layout: the placeholders of the image first, padding behind or between."""
    import torch

    rows = [blip.text.prompt(prompt)["tokens"].tolist() for prompt in prompts]
    longest, pad = max(map(len, rows)), blip.variant.llm.pad_id
    fill = [[pad] * (longest - len(row)) for row in rows]
    rows = [[*f, *row] if left else [*row, *f] for f, row in zip(fill, rows, strict=True)]
    text = torch.tensor(rows)
    image = torch.full((len(rows), blip.variant.visual_tokens), theirs.config.image_token_index)
    seen = (text != pad).long()
    return {
        "pixel_values": torch.tensor(golden_blip2.normalised(images)),
        "input_ids": torch.cat([image, text], dim=1),
        "attention_mask": torch.cat([torch.ones_like(image), seen], dim=1),
    }


def test_logits_are_those_of_transformers(pair):
    import torch

    folder, blip, theirs = pair
    images, decodes = pictures(blip), blip.variant.llm.encoder_decoder
    examples = [blip.text.example(prompt, "a red dog") for prompt in PROMPTS]
    examples = [
        {"images": image[None], **example} for image, example in zip(images, examples, strict=True)
    ]
    sizes = {"visual_tokens": blip.variant.visual_tokens, "pad_id": blip.variant.llm.pad_id}
    batch = collate(examples, **sizes)
    del batch["truncated"]
    if not decodes:
        batch = {name: leaf for name, leaf in batch.items() if name not in ("asked", "targets")}
        batch = ask_every_slot(blip.variant, batch)
    found = np.asarray(blip.logits(batch))
    with torch.no_grad():
        for row, example in enumerate(examples):
            visual = torch.full((1, blip.variant.visual_tokens), theirs.config.image_token_index)
            ids = torch.cat([visual, torch.tensor(example["tokens"])[None].long()], dim=1)
            more = {}
            if decodes:
                more["decoder_input_ids"] = torch.tensor(example["decoder_tokens"])[None].long()
            expected = theirs(
                pixel_values=torch.tensor(golden_blip2.normalised(images[row : row + 1])),
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **more,
            ).logits[0]
            assert error(found[row][: len(expected)], expected.numpy()) < 1e-4


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "repetition_penalty": 1.5}])
def test_answers_are_those_of_transformers(pair, settings):
    import torch

    _, blip, theirs = pair
    images, llm = pictures(blip), blip.variant.llm
    found = blip.generate(
        list(images), PROMPTS, max_new_tokens=NEW, length_rule="transformers5", **settings
    )
    given = given_to_theirs(blip, theirs, PROMPTS, images, left=not llm.encoder_decoder)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asked = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW} | settings
        made = theirs.generate(**given, eos_token_id=llm.eos_id, pad_token_id=llm.pad_id, **asked)
    start = 1 if llm.encoder_decoder else given["input_ids"].shape[1]
    for answer, row in zip(found, made[:, start:].tolist(), strict=True):
        row = row[: row.index(llm.eos_id) + 1] if llm.eos_id in row else row
        assert list(answer.tokens) == row


def test_there_and_back_no_bit_changes(pair, tmp_path):
    folder, blip, _ = pair
    ours = jax_instructblip.convert(folder, tmp_path / "ours")
    assert not (tmp_path / "ours" / "qformer_tokenizer").exists()  # it reads no instruction
    back = jax_instructblip.export(ours, tmp_path / "back")
    assert_same_tensors(back, folder)
    load_in_transformers(back, SECOND)
    # The processor puts as many placeholders before a prompt as there are queries.
    stored = json.loads((back / "processor_config.json").read_text())
    assert stored["processor_class"] == "Blip2Processor"
    assert stored["num_query_tokens"] == blip.variant.qformer.queries
    again = jax_instructblip.load(ours, dtype=jnp.float32)
    assert again.variant == blip.variant
    jax.tree.map(np.testing.assert_array_equal, again.params, blip.params)
