"""The suite `train`: a step of tuning the Q-Former on samples of the paper's mixture.

Lengths of the samples are drawn from `mixture_lengths.json`. Both sides get the same samples, in
batches of which the longest sample has the median length of such batches: ours packs them into rows
of several samples, transformers pads each to the longest one. Counted are samples, not tokens.
Dropout is off, so that the losses can be compared.
"""

from typing import Any

import numpy as np

from benchmarks.packing import read_lengths
from benchmarks.sides import Built, Case
from benchmarks.workload import SIZES, Sample, variant_of
from jax_instructblip.models.variants import Variant

DRAWN = 51  # batches, of which the one with the median longest sample is taken
RATE = 1e-5


def cases(sizes: str) -> list[Case]:
    """Returns the cases of a size of models, a key of `workload.SIZES`.

    Full models have the paper's batch.
    """
    batches = {"tiny": (4,), "middle": (32, 128), "full": (128,)}[sizes]
    return [
        {"variant": name, "batch": batch, "samples_per_row": min(8, batch)}
        for name in SIZES[sizes]
        for batch in batches
    ]


def samples_of(case: Case) -> tuple[Variant, list[Sample]]:
    """Returns the variant of a case, and the samples of its batch (`case["batch"]` of them)."""
    variant, rng = variant_of(case["variant"]), np.random.default_rng(0)
    recorded = read_lengths("flan_t5" if variant.llm.encoder_decoder else "vicuna")
    drawn = recorded[rng.integers(0, len(recorded), (DRAWN, case["batch"]))]
    longest = drawn[..., 1:].max(axis=1).sum(axis=-1)
    chosen = drawn[int(np.argsort(longest, kind="stable")[DRAWN // 2])]
    if not variant.llm.encoder_decoder:  # recorded are prompt and answer together
        chosen = np.stack([chosen[:, 0], chosen[:, 1] - chosen[:, 2], chosen[:, 2]], axis=1)
    most = variant.qformer.max_positions
    lengths = np.stack([chosen[:, 0].clip(1, most), *chosen[:, 1:].clip(1).T], axis=1)
    return variant, [Sample.draw(variant, rng, *row) for row in lengths.tolist()]


def ours(case: Case) -> Built:
    """Returns our side: a call is a training step on packed rows and returns the loss."""
    import jax
    import jax.numpy as jnp

    from benchmarks.ours import device_peak, load, training_batch
    from jax_instructblip.training.objective import LanguageObjective
    from jax_instructblip.training.optimizer import adamw
    from jax_instructblip.training.state import create_state, partition
    from jax_instructblip.training.step import compile_step

    variant, samples = samples_of(case)
    model, params = load(case, unstacked=False)
    host = training_batch(model.variant, samples, case["samples_per_row"])
    batch = jax.device_put(host)
    schedule = lambda step: jnp.float32(RATE)
    optimizer = adamw(schedule)
    chosen, frozen = partition(params, ("qformer",))
    del params
    box = {"state": create_state(chosen, optimizer)}
    del chosen
    narrow = jnp.dtype(case["dtype"]).itemsize < 4
    objective = LanguageObjective(model)
    step = compile_step(
        objective=objective, optimizer=optimizer, schedule=schedule, narrow_weights=narrow
    )
    key = jax.random.key(0)

    def call() -> float:
        box["state"], metrics = step(box["state"], frozen, batch, key)
        return float(metrics["loss"])

    return Built(call, facts(samples, host["segments"].size, host["targets"].size), device_peak)


def transformers(case: Case) -> Built:
    """Returns the side of transformers: a call is a step on padded rows and returns the loss."""
    import torch

    from benchmarks import theirs

    variant, samples = samples_of(case)
    model, dtype = theirs.load(case), getattr(torch, case["dtype"])
    model.train()
    model.vision_model.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(theirs.TRAINED))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_gpu = theirs.device().type == "cuda"
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.05, fused=on_gpu)
    inputs = theirs.training_inputs(variant, samples, dtype)

    def call() -> float:
        narrow = dtype == torch.bfloat16
        with torch.autocast(theirs.device().type, dtype=torch.bfloat16, enabled=narrow):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    peak = theirs.device_peak if on_gpu else None
    return Built(call, facts(samples, inputs["input_ids"].numel(), inputs["labels"].numel()), peak)


def facts(samples: list[Sample], positions: int, targets: int) -> dict[str, Any]:
    """Returns the work of a step: its samples, and the positions that it computes for them.

    `positions` are slots of rows and `targets` slots of targets, padding included.
    """
    return {"work": len(samples), "unit": "samples", "positions": positions, "targets": targets}


SIDES = {"jax_instructblip": ours, "transformers": transformers}
