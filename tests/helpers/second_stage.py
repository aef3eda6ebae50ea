"""BLIP-2's second stage beside the values of the original code: one folder, and its comparisons."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_instructblip import checkpoint
from jax_instructblip.data.batch import collate
from jax_instructblip.inference.batching import ask_every_slot
from jax_instructblip.inference.beam_search import beam_tokens
from jax_instructblip.inference.decode import generate_tokens
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.models.vlm import VisionLanguageModel
from tests.helpers import golden, golden_blip2
from tests.helpers.numerics import error
from tests.helpers.stages import stages

TOWER, LOSS, GRADIENT = 1e-4, 1e-5, 1e-4  # parts of the largest value; the loss absolutely

GREEDY = {"greedy": {}, "greedy_rep1.5": {"repetition_penalty": 1.5}}
# `min_length` and `max_length` of the original count the id before the first new one.
GREEDY["greedy_min8"] = {"min_new_tokens": 7}
BEAMS = {
    "beam5_lp-1": {"length_penalty": -1.0},
    "beam5_lp0": {"length_penalty": 0.0},
    "beam5_lp1": {},
    "beam5_lp2": {"length_penalty": 2.0},
    "beam5_rep1.5_lp1": {"repetition_penalty": 1.5},
    "beam5_rep1.5_lp-1_min6_max9": {
        **{"repetition_penalty": 1.5, "length_penalty": -1.0},
        **{"min_new_tokens": 5, "max_new_tokens": 9},
    },
    "beam3_ret3_lp1": {"num_beams": 3, "max_new_tokens": 10},
    "beam5_rep1.5_lp1_max30": {"repetition_penalty": 1.5, "max_new_tokens": 30},
}


class SecondStage:
    """Sizes and parameters by the package's converter, recorded values, batches of real texts."""

    def __init__(self, case: str, folder):
        self.case, self.variant = case, golden_blip2.variant(case)
        self.model = VisionLanguageModel(self.variant)
        self.params = golden_blip2.params(folder, case)
        self.recorded = golden.outputs(case)
        with np.load(golden.GOLDEN / case / "inputs.npz") as file:
            self.given = {name: [str(each) for each in texts] for name, texts in file.items()}

    def batch(self, examples: Sequence[dict]) -> dict[str, np.ndarray]:
        """The recorded images with these examples, laid out as the package does."""
        laid = [
            {"images": image, **{k: leaf for k, leaf in example.items() if k != "truncated"}}
            for image, example in zip(golden.images(), examples, strict=True)
        ]
        sizes = {"visual_tokens": self.variant.visual_tokens, "pad_id": self.variant.llm.pad_id}
        return collate(laid, **sizes)

    def training(self, prompts, answers, **limits) -> dict[str, np.ndarray]:
        text = golden_blip2.text_processor(self.case, **limits)
        return self.batch([text.example(*pair) for pair in zip(prompts, answers, strict=True)])

    def answering(self, prompts, limit: int | None = None) -> dict[str, np.ndarray]:
        text = golden_blip2.text_processor(self.case)
        prompts = [text.prompt(prompt) for prompt in prompts]
        return self.batch([{**each, "tokens": each["tokens"][:limit]} for each in prompts])

    def check_prompt(self, tag: str, batch, inputs) -> None:
        """Compares the rows that the language model is given, whatever stands between them."""
        embeds, mask = "inputs_embeds", "attention_mask"
        start = f"{tag}/" if f"{tag}/{embeds}" in self.recorded else f"{tag}/llm_"
        valid = self.recorded[start + mask] > 0
        assert [int(n) for n in (batch["segments"] > 0).sum(axis=1)] == valid.sum(axis=1).tolist()
        for ours, theirs, seen in zip(inputs, self.recorded[start + embeds], valid, strict=True):
            assert error(ours[: seen.sum()], theirs[seen]) < TOWER

    def check_training(self, tag: str, batch) -> None:
        """Compares prompt, Q-Former, logits, loss and gradients of a recorded training step."""
        recorded, decodes = self.recorded, self.variant.llm.encoder_decoder
        (loss, made), gradient = stages(self.variant)(self.params["qformer"], self.params, batch)
        self.check_prompt(tag, batch, made["prompt"])
        assert error(made["image_norm"], recorded["vit/ln_vision"]) < TOWER
        assert error(made["queries"], recorded[f"{tag}/qformer_last_hidden"]) < TOWER
        labels, logits = recorded[f"{tag}/llm_labels"], recorded[f"{tag}/logits"]
        for row, targets in enumerate(batch["targets"]):
            count = (targets != golden.IGNORE).sum()
            own = labels[row] != golden.IGNORE
            np.testing.assert_array_equal(targets[:count], labels[row][own])
            # A decoder alone tells a label from the slot before it.
            theirs = logits[row][own if decodes else np.roll(own, -1)]
            assert error(made["logits"][row][:count], theirs) < TOWER
        if decodes:
            valid = recorded[f"{tag}/llm_attention_mask"] > 0
            for ours, theirs, seen in zip(
                made["encoded"], recorded[f"{tag}/encoder_out"], valid, strict=True
            ):
                assert error(ours[: seen.sum()], theirs[seen]) < TOWER
        else:
            self.check_every_slot(tag, batch)
        assert abs(loss - recorded[f"{tag}/loss"]) < LOSS
        self.check_gradient(tag, gradient)

    def check_every_slot(self, tag: str, batch) -> None:
        batch = {name: leaf for name, leaf in batch.items() if name not in ("asked", "targets")}
        found = self.apply(self.params, ask_every_slot(self.variant, batch))
        valid = self.recorded[f"{tag}/llm_attention_mask"] > 0
        for ours, theirs, seen in zip(found, self.recorded[f"{tag}/logits"], valid, strict=True):
            assert error(ours[: seen.sum()], theirs[seen]) < TOWER

    @functools.cached_property
    def apply(self):
        return jax.jit(lambda params, batch: self.model.apply({"params": params}, batch))

    @functools.cached_property
    def embed_row(self):
        return jax.jit(
            lambda params, batch: self.model.apply({"params": params}, batch, method="embed_row")
        )

    def check_gradient(self, tag: str, gradient) -> None:
        leaves = checkpoint.flatten({"qformer": gradient})
        own = {"queries": "query_tokens", "image_norm": "ln_vision"}
        projection = {"opt": "opt_proj", "t5": "t5_proj"}[self.variant.llm.kind]
        own["projection"] = projection
        sums = dict.fromkeys([*own.values(), "Qformer", "ALL"], 0.0)
        for path, leaf in leaves.items():
            square = np.square(np.float64(leaf)).sum()
            sums[own.get(path.split("/")[1], "Qformer")] += square
            sums["ALL"] += square
        for group, total in sums.items():
            wanted = self.recorded[f"{tag}/gradnorm/{group}"]
            assert abs(np.sqrt(total) - wanted) < GRADIENT * wanted, group
        names = [name for name in self.recorded if name.startswith(f"{tag}/grad/")]
        if not names:
            return  # norms alone are recorded
        wanted = golden_blip2.gradients_like(self.recorded, f"{tag}/grad/", leaves, self.case)
        top = max(np.abs(leaf).max() for leaf in wanted.values())
        assert wanted.keys() == leaves.keys() and len(names) == 91
        for path, expected in wanted.items():
            assert np.abs(leaves[path] - expected).max() < GRADIENT * top, path

    def check_first_steps(self, tag: str, batch) -> None:
        """Compares the prompt and the recorded scores of a greedy answer."""
        first = jax.jit(
            lambda params, batch: self.model.apply({"params": params}, batch, method=_prefill)
        )
        step = jax.jit(
            lambda params, token, cache: self.model.apply(
                {"params": params}, token, cache, method="decode_step"
            )
        )
        prompt, logits, cache = first(self.params, batch)
        self.check_prompt(tag, batch, prompt)
        ids = self.recorded[f"{tag}/greedy/ids"]  # the first one is the start, never predicted
        for index in range(3):
            assert error(logits[:, 0], self.recorded[f"{tag}/greedy/scores_step{index}"]) < TOWER
            token = jnp.asarray(ids[:, index + 1 : index + 2], jnp.int32)
            logits, cache = step(self.params, token, cache)

    def check_greedy(self, tag: str, setting: str, batch) -> None:
        recorded = self.recorded[f"{tag}/{setting}/ids"]
        count = 12 if self.variant.llm.encoder_decoder else 11  # `max_length` counts the start
        made = generate_tokens(
            self.model,
            self.params,
            batch,
            jax.random.split(jax.random.key(0), len(recorded)),
            GenerationConfig(max_new_tokens=count, **GREEDY[setting]),
        )
        rows = self.rows(jax.tree.map(np.asarray, made), 1)
        assert rows == [self.until_end(row) for row in recorded[:, 1:]]
        self.check_text(rows, self.recorded[f"{tag}/{setting}/text"])

    def check_beams(self, name: str, batch, **settings) -> None:
        recorded = self.recorded[f"{name}/ids"][:, 1:]
        made = beam_tokens(self.model, self.params, batch, GenerationConfig(**settings))
        made = jax.tree.map(np.asarray, made)
        kept = len(recorded) // len(made["tokens"])
        rows = self.rows(made, kept)
        assert rows == [self.until_end(row) for row in recorded]
        scores = made["scores"][:, :kept].reshape(-1)
        wanted = self.recorded[f"{name}/sequences_scores"]
        np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-4)
        self.check_text(rows, self.recorded[f"{name}/text"])

    def beam_settings(self, setting: str) -> dict:
        settings = {"num_beams": 5, "max_new_tokens": 12} | BEAMS[setting]
        settings["max_new_tokens"] -= not self.variant.llm.encoder_decoder
        return settings

    def rows(self, made, kept: int) -> list[list[int]]:
        return [
            list(row[:length])
            for tokens, lengths in zip(made["tokens"], made["lengths"], strict=True)
            for row, length in zip(tokens[:kept], lengths[:kept], strict=True)
        ]

    def until_end(self, row) -> list[int]:
        row, end = list(row), self.variant.llm.eos_id
        return row[: row.index(end) + 1] if end in row else row

    def check_text(self, rows, recorded) -> None:
        decode = golden_blip2.text_processor(self.case).decode
        assert [decode(row) for row in rows] == [str(text).strip() for text in recorded]


def _prefill(model, batch):
    inputs = model.embed_row(batch)
    return inputs, *model.llm.prefill(inputs, batch["segments"] > 0, 4)
