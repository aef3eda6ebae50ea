"""Compares one training step of the tiny variants on the default device with CPU float32.

Prints one JSON object as its last line: for each variant and compute dtype the relative error of
loss, logits and gradient norm. On a machine without accelerator the CPU is compared with itself.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ours import random_batch
from benchmarks.workload import SIZES, Lengths
from jax_instructblip.models.released import get_variant
from jax_instructblip.models.vlm import VisionLanguageModel, init_params
from jax_instructblip.training.objective import LanguageObjective
from jax_instructblip.training.optimizer import adamw, warmup_cosine
from jax_instructblip.training.state import create_state, partition
from jax_instructblip.training.step import compile_step


def one_step(name: str, dtype: jnp.dtype, device: jax.Device) -> dict[str, np.ndarray]:
    """Returns `logits`, `loss` and `gradient_norm` of a first step on `device`, without dropout.

    `name` is a variant's, as `get_variant` takes it; `dtype` is that of the computation.
    """
    variant = get_variant(name).replace(**{"qformer.dropout": 0.0, "llm.dropout": 0.0})
    schedule = warmup_cosine(start=1e-5, peak=1e-5, end=0.0, warmup_steps=1, total_steps=10)
    with jax.default_device(device):
        # Drawn on the CPU, so that every device has the same weights.
        with jax.default_device(jax.devices("cpu")[0]):
            params = init_params(variant, jax.random.key(0))
        params = jax.device_put(params, device)
        batch = jax.device_put(random_batch(variant, 4, Lengths.of(name)), device)
        model = VisionLanguageModel(variant, dtype)
        logits = jax.jit(lambda params, batch: model.apply({"params": params}, batch))(
            params, batch
        )
        trainable, frozen = partition(params, ("qformer",))
        optimizer = adamw(schedule)
        objective = LanguageObjective(model)
        step = compile_step(objective=objective, optimizer=optimizer, schedule=schedule)
        _, metrics = step(create_state(trainable, optimizer), frozen, batch, jax.random.key(0))
        return {
            "logits": np.asarray(logits, np.float64),
            "loss": np.asarray(metrics["loss"], np.float64),
            "gradient_norm": np.asarray(metrics["gradient_norm"], np.float64),
        }


def main() -> None:
    """Compares all tiny variants and prints the results as one line of JSON."""
    rows = []
    for name in SIZES["tiny"]:
        truth = one_step(name, jnp.dtype(jnp.float32), jax.devices("cpu")[0])
        for dtype in (jnp.float32, jnp.bfloat16):
            found = one_step(name, jnp.dtype(dtype), jax.devices()[0])
            error = {
                key: float(np.linalg.norm(found[key] - truth[key]) / np.linalg.norm(truth[key]))
                for key in truth
            }
            rows.append({"variant": name, "dtype": jnp.dtype(dtype).name, "relative_error": error})
    print(json.dumps({"side": "numerics", "device": jax.devices()[0].device_kind, "rows": rows}))


if __name__ == "__main__":
    main()
