"""This package's side of a comparison: weights on the device, and batches. Imports no torch."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.workload import Lengths, Questions, Sample, variant_of
from jax_instructblip.checkpoint import flatten, unflatten
from jax_instructblip.conversion.hf_folder import convert_hf
from jax_instructblip.data.batch import IGNORE, collate
from jax_instructblip.data.packing import deal, row_lengths
from jax_instructblip.inference.loading import load_params, read_source
from jax_instructblip.models.layers import Scan, Scans
from jax_instructblip.models.variants import T5Config, Variant
from jax_instructblip.models.vlm import VisionLanguageModel, param_shapes, unstack_decoder


def load(case: dict[str, Any], *, unstacked: bool) -> tuple[VisionLanguageModel, dict[str, Any]]:
    """Returns model and parameters of a case: those of its folder, else random on the device.

    Of `case` the fields `variant`, `device`, `dtype` and, if there, `folder` are read.
    `unstacked` decoding layers are what `jax_instructblip.load` makes; training stacks them.
    """
    if case["device"] == "gpu" and jax.default_backend() != "gpu":
        raise RuntimeError(f"--device gpu, but JAX computes on {jax.default_backend()}")
    dtype, folder = jnp.dtype(case["dtype"]), case.get("folder")
    if folder and unstacked:
        source = read_source(folder)
        variant, params = source.variant, load_params(source, dtype)
    elif folder:
        converted = convert_hf(folder)
        variant = converted.variant
        params = unflatten({path: jnp.asarray(leaf, dtype) for path, leaf in converted.leaves})
    else:
        still = {"qformer.dropout": 0.0, "llm.dropout": 0.0}
        variant = variant_of(case["variant"]).replace(**still)
        params = random_params(variant, dtype)
        params = unstack_decoder(variant, params) if unstacked else params
    return VisionLanguageModel(variant, dtype, Scans(llm=Scan(unstacked=unstacked))), params


def random_params(variant: Variant, dtype: Any) -> dict[str, Any]:
    """Returns random weights, created on the device: norms near 1, kernels of unit gain."""
    made = {}
    for number, (path, leaf) in enumerate(flatten(param_shapes(variant)).items()):
        name, key = path.rsplit("/", 1)[-1], jax.random.key(number)
        if name in ("scale", "bias"):
            value = jnp.full(leaf.shape, float(name == "scale"), dtype)
        else:
            # Only the second-last axis counts as fan-in; other leaves use a fixed number.
            fan_in = leaf.shape[-2] if name == "kernel" and len(leaf.shape) > 1 else 2500
            draw = jax.jit(
                lambda key, shape=leaf.shape, std=0.7 * fan_in**-0.5: (
                    std * jax.random.normal(key, shape, dtype)
                )
            )
            value = draw(key)
        made[path] = value
    return unflatten(made)


def random_batch(variant: Variant, size: int, lengths: Lengths) -> dict[str, jax.Array]:
    """Returns a training batch of `size` rows of full length (no padding) on the device."""
    rng = np.random.default_rng(0)
    samples = [
        Sample.draw(variant, rng, lengths.instruction, lengths.prompt, lengths.answer)
        for _ in range(size)
    ]
    return jax.device_put(training_batch(variant, samples, 1))


def training_batch(
    variant: Variant, samples: Sequence[Sample], samples_per_row: int
) -> dict[str, np.ndarray]:
    """Returns the batch that training makes of `samples`, in rows of `samples_per_row`."""
    examples = [_example(variant, sample) for sample in samples]
    sizes = [
        {
            "images": 1,
            "qformer_tokens": len(each["qformer_tokens"]),
            "slots": variant.visual_tokens + len(each["tokens"]),
            "targets": int((each["targets"] != IGNORE).sum()),
        }
        for each in examples
    ]
    shared = deal(
        [(size["slots"], size["targets"]) for size in sizes], len(samples) // samples_per_row
    )
    longest = max(size["qformer_tokens"] for size in sizes)
    packed = samples_per_row > 1
    return collate(
        [examples[number] for number in shared.flat],
        visual_tokens=variant.visual_tokens,
        samples_per_row=samples_per_row,
        lengths=row_lengths(sizes, shared, math.ceil(longest / 32) * 32) if packed else None,
        pad_id=variant.llm.pad_id,
    )


def _example(variant: Variant, sample: Sample) -> dict[str, np.ndarray]:
    """Returns an example of `data/batch.py`."""
    made = {"images": sample.image[None], "qformer_tokens": sample.instruction}
    if isinstance(variant.llm, T5Config):
        start = np.array([variant.llm.decoder_start_id], np.int32)
        decoder = np.concatenate([start, sample.answer[:-1]])
        return {
            **made,
            "tokens": sample.prompt,
            "decoder_tokens": decoder,
            "targets": sample.answer,
        }
    ignored = np.full(len(sample.prompt), IGNORE, np.int32)
    text = np.concatenate([sample.prompt, sample.answer])
    return {**made, "tokens": text, "targets": np.concatenate([ignored, sample.answer])}


def question_batch(variant: Variant, asked: Questions) -> dict[str, jax.Array]:
    """Returns the batch of questions without padding, on the device."""
    rows = zip(asked.images, asked.instructions, asked.prompts, strict=True)
    examples = [
        {"images": image[None], "qformer_tokens": text, "tokens": tokens}
        for image, text, tokens in rows
    ]
    return jax.device_put(collate(examples, visual_tokens=variant.visual_tokens))


def device_peak() -> int | None:
    """Returns the peak bytes in use on the accelerator; None on a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")
