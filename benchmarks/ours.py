"""Times this package: train step and greedy decoding of one variant with random weights.

Prints one JSON object as its last line. `gpu.py` runs it in its own process, so that it does not
share the GPU memory with PyTorch.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.workload import TRAIN_BATCH, Lengths, decode_bytes, seconds, train_flops
from jax_instructblip.checkpoint import flatten, unflatten
from jax_instructblip.data.batch import IGNORE, collate
from jax_instructblip.inference.decode import generate_tokens
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.models.released import get_variant
from jax_instructblip.models.variants import Variant
from jax_instructblip.models.vlm import VisionLanguageModel, param_shapes
from jax_instructblip.training.objective import LanguageObjective
from jax_instructblip.training.optimizer import adamw, warmup_cosine
from jax_instructblip.training.state import create_state, partition
from jax_instructblip.training.step import compile_step


def random_params(variant: Variant, dtype: jnp.dtype) -> dict:
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


def random_batch(variant: Variant, size: int, lengths: Lengths, training: bool) -> dict:
    """Returns a batch of `size` rows of full length (no padding) on the device."""
    rng = np.random.default_rng(0)
    side, m = variant.vision.image_size, variant.llm

    def ids(width: int, vocab: int) -> np.ndarray:
        return rng.integers(3, vocab, (size, width)).astype(np.int32)

    answer = ids(lengths.answer, min(m.vocab, 32000))
    tokens = ids(lengths.prompt, min(m.vocab, 32000))
    leaves = {
        "images": rng.integers(0, 256, (size, 1, side, side, 3), dtype=np.uint8),
        "qformer_tokens": ids(lengths.instruction, variant.qformer.vocab),
        "tokens": tokens,
    }
    if training and m.kind == "t5":
        start = np.full((size, 1), m.decoder_start_id, np.int32)
        leaves["decoder_tokens"] = np.concatenate([start, answer[:, :-1]], axis=1)
        leaves["targets"] = answer
    elif training:
        ignored = np.full((size, lengths.prompt), IGNORE, np.int32)
        leaves["targets"] = np.concatenate([ignored, answer], axis=1)
        leaves["tokens"] = np.concatenate([tokens, answer], axis=1)
    examples = [{name: leaf[row] for name, leaf in leaves.items()} for row in range(size)]
    return jax.device_put(collate(examples, visual_tokens=variant.visual_tokens))


def time_training(name: str, params: dict, batch: int, lengths: Lengths, repeats: int) -> dict:
    """Returns seconds per step and samples per second at the largest batch that fits, as a dict.

    Starts from `batch` and halves it while memory runs out.
    """
    variant = get_variant(name)
    schedule = warmup_cosine(start=1e-8, peak=1e-5, end=0.0, warmup_steps=1000, total_steps=60_000)
    trainable, frozen = partition(params, ("qformer",))
    tried = []
    while batch:
        optimizer = adamw(schedule)
        step = compile_step(
            objective=LanguageObjective(VisionLanguageModel(variant, jnp.bfloat16)),
            optimizer=optimizer,
            schedule=schedule,
        )
        state, key = create_state(trainable, optimizer), jax.random.key(0)
        data, box = random_batch(variant, batch, lengths, training=True), {}

        def once(step=step, data=data, key=key, box=box):
            box["state"], metrics = step(box["state"], frozen, data, key)
            box["loss"] = float(metrics["loss"])

        box["state"] = state
        try:
            took = seconds(once, repeats)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            tried.append(batch)
            batch //= 2
            continue
        rate = batch / took["median"]
        return {
            "batch": batch,
            "out_of_memory_at": tried,
            "seconds": took,
            "samples_per_second": rate,
            "tflops_needed_per_second": rate * train_flops(variant, lengths) / 1e12,
            "loss": box["loss"],
        }
    return {"out_of_memory_at": tried}


def time_decoding(name: str, params: dict, batch: int, lengths: Lengths, repeats: int) -> dict:
    """Returns the seconds for image, prompt and `lengths.new` greedy tokens of `batch` rows.

    Also tokens per second, and time and weight bytes per step, as a dict.
    """
    variant = get_variant(name)
    model = VisionLanguageModel(variant, jnp.bfloat16)
    data = random_batch(variant, batch, lengths, training=False)
    keys = jax.random.split(jax.random.key(0), batch)

    def answer(new: int):
        config = GenerationConfig(max_new_tokens=new, min_new_tokens=new)
        made = generate_tokens(model, params, data, keys, config)
        return jax.block_until_ready(made)

    whole = seconds(lambda: answer(lengths.new), repeats)
    first = seconds(lambda: answer(1), repeats)
    step = (whole["median"] - first["median"]) / (lengths.new - 1)
    return {
        "batch": batch,
        "new_tokens": lengths.new,
        "seconds": whole,
        "seconds_to_first": first,
        "tokens_per_second": batch * lengths.new / whole["median"],
        "milliseconds_per_step": 1e3 * step,
        "weight_gigabytes_per_second": decode_bytes(name) / 1e9 / step if step > 0 else None,
    }


def main() -> None:
    """Measures one variant and prints the results as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", required=True)
    parser.add_argument("--batch", type=int, default=None, help="training batch to start from")
    parser.add_argument("--decode_batches", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    lengths = Lengths.of(flags.variant)
    params = random_params(get_variant(flags.variant), jnp.dtype(jnp.bfloat16))
    result = {
        "side": "jax_instructblip",
        "variant": flags.variant,
        "versions": {"jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "decode": [
            time_decoding(flags.variant, params, size, lengths, flags.repeats)
            for size in flags.decode_batches
        ],
    }
    batch = flags.batch or TRAIN_BATCH.get(flags.variant, 8)
    result["train"] = time_training(flags.variant, params, batch, lengths, flags.repeats)
    stats = jax.devices()[0].memory_stats() or {}
    result["peak_gigabytes"] = stats.get("peak_bytes_in_use", 0) / 1e9
    print(json.dumps(result))


if __name__ == "__main__":
    main()
