"""LLaVA's two stages beside transformers: gradients, and AdamW steps with schedule and clipping."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jax_instructblip.checkpoint.trees import flatten
from jax_instructblip.conversion.hf_folder import read_hf
from jax_instructblip.data.spec import IGNORE
from jax_instructblip.models.vlm import VisionLanguageModel
from jax_instructblip.training.objective import LanguageObjective
from jax_instructblip.training.optimizer import adamw, warmup_cosine
from jax_instructblip.training.state import create_state, partition
from jax_instructblip.training.step import train_step
from tests.helpers.golden_blip2 import normalised
from tests.helpers.llava_folders import batch_of, draw_conversations, write_llava
from tests.helpers.numerics import error

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")

CASES = [  # language model, whether the projector is one linear layer
    ("llama", True),
    ("qwen2", False),
    *(pytest.param(case, marks=pytest.mark.full) for case in [("llama", False), ("qwen3", True)]),
]
STAGES = {1: ("projector",), 2: ("projector", "llm")}
RATE, WARM_UP, TOTAL = 1e-3, 1, 10
CLIP = 0.5  # below the gradient norm of every case: 0.95 and more
STEPS = 4  # the first of the warm-up has a rate of 0: three that move


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{1 if case[1] else 2}")
def pair(request, tmp_path_factory):
    kind, linear = request.param
    folder = tmp_path_factory.mktemp("llava") / kind
    theirs = write_llava(folder, kind, linear)
    variant, params = read_hf(folder)
    image = theirs.config.image_token_index
    rows, pixels = draw_conversations(3, variant.llm.vocab, image)
    batch = batch_of(rows, pixels, image)
    longest = batch["tokens"].shape[1]
    ids = np.array([[*row, *[0] * (longest - len(row))] for row in rows])
    # The second half of each row is learned, images are not.
    half = np.arange(longest) >= np.array([len(row) // 2 for row in rows])[:, None]
    learned = half & (batch["segments"] > 0) & (batch["slots"] < 0)
    labels = np.where(learned, ids, IGNORE)
    following = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
    return types.SimpleNamespace(
        folder=folder,
        linear=linear,
        theirs=theirs,
        variant=variant,
        params=params,
        batch={**batch, "targets": following.astype(np.int32)},
        inputs={
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(batch["segments"]),
            "pixel_values": torch.tensor(normalised(pixels)),
            "labels": torch.tensor(np.where(labels == IGNORE, -100, labels)),
        },
    )


def freeze(pair, trained):
    """Their parameters that are trained, from the weights of the folder."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(pair.folder).train()
    for name, leaf in model.named_parameters():
        part = "projector" if "projector" in name else "vision" if "vision" in name else "llm"
        # The identity that stands for the second layer of LLaVA v1 is none of the projector.
        leaf.requires_grad = part in trained and not (pair.linear and "linear_2" in name)
    return model, [leaf for leaf in model.parameters() if leaf.requires_grad]


def as_ours(pair, model, folder):
    """The leaves of a model of theirs, by our paths."""
    model.save_pretrained(folder)
    for path in pair.folder.iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    return flatten(read_hf(folder)[1])


@pytest.fixture(scope="module", params=STAGES, ids=lambda stage: f"stage{stage}")
def ours(request, pair):
    """State and metrics after each step of a stage."""
    schedule = warmup_cosine(start=0.0, peak=RATE, end=0.0, warmup_steps=WARM_UP, total_steps=TOTAL)
    optimizer = adamw(schedule, weight_decay=0.0)
    step = functools.partial(
        train_step,
        objective=LanguageObjective(VisionLanguageModel(pair.variant)),
        optimizer=optimizer,
        schedule=schedule,
        clip_norm=CLIP,
    )
    trained = STAGES[request.param]
    chosen, frozen = partition(jax.tree.map(jnp.asarray, pair.params), trained)
    state, run, states = create_state(chosen, optimizer), jax.jit(step), []
    for _ in range(STEPS):
        state, metrics = run(state, frozen, pair.batch, jax.random.key(0))
        states.append((state, metrics))
    return types.SimpleNamespace(trained=trained, states=states)


def test_gradients_of_every_trained_tensor(pair, ours, tmp_path):
    model, leaves = freeze(pair, ours.trained)
    loss = model(**pair.inputs).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(leaves, CLIP)
    assert norm > 1.1 * CLIP  # so the clipping counts
    for leaf in leaves:
        leaf.data = leaf.grad
    expected = as_ours(pair, model, tmp_path / "gradients")
    state, metrics = ours.states[0]
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert float(metrics["gradient_norm"]) == pytest.approx(norm.item(), rel=1e-4)
    found = flatten(state.optimizer[0].mu)  # a tenth of the clipped gradient
    assert {path.partition("/")[0] for path in found} == set(ours.trained)
    for path, leaf in found.items():
        assert np.abs(expected[path]).max() > 0, path
        assert error(10 * np.asarray(leaf), expected[path]) < 1e-4, path


def test_steps_of_adamw(pair, ours, tmp_path):
    model, leaves = freeze(pair, ours.trained)
    optimizer = torch.optim.AdamW(leaves, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARM_UP, TOTAL)
    for _, metrics in ours.states:
        assert float(metrics["learning_rate"]) == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
        loss = model(**pair.inputs).loss
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, CLIP)
        optimizer.step()
        schedule.step()
    after = as_ours(pair, model, tmp_path / "after")
    before = flatten(pair.params)
    for path, leaf in flatten(ours.states[-1][0].params).items():
        moved = np.abs(after[path] - before[path])
        assert RATE < moved.max() < STEPS * RATE, path
        # A hundredth of a step: Adam makes whole steps of the smallest gradients.
        assert np.abs(np.asarray(leaf) - after[path]).max() < 1e-2 * RATE, path
