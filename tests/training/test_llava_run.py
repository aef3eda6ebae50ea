"""Whole runs of LLaVA's two stages: what is trained, what stays, what the steps cost."""

import numpy as np
import pytest

import jax_instructblip
from jax_instructblip import checkpoint
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.inference.loading import read_params, read_source
from jax_instructblip.training.metrics import read_metrics
from tests.helpers.tiny import QUESTION, compile_cache, write_base, write_data
from tests.training.test_loop import make_config, manifests, run

CHAT = {"chat.template": "v1", "chat.limit": 300, "data.augment": False, "data.crop": "pad"}
RATES = {"optimizer.weight_decay": 0.0, "optimizer.clip_norm": 1.0, "optimizer.warmup_ratio": 0.03}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The base, and a run of each stage: the second starts from the first."""
    folder = tmp_path_factory.mktemp("llava")
    files = write_base(folder / "base", "llava"), write_data(folder / "data")
    fields = {**CHAT, **RATES, "model.trainable": ("projector",), "checkpoints.every": 50}
    fields |= {"train.epochs": 4.0, "train.steps": 999}  # 3 steps an epoch of 12 records
    with compile_cache(folder / "compiled"):
        first = run(make_config(files, folder / "first", **fields))
        fields |= {"model.init": str(first), "model.trainable": ("projector", "llm")}
        fields |= {"optimizer.learning_rate": 3e-3, "model.remat.llm": "full"}
        second = run(make_config(files, folder / "second", **fields))
    return files[0], first, second


def leaves(path):
    return checkpoint.flatten(read_params(read_source(path), lambda path, array: np.array(array)))


def test_each_stage_changes_what_it_trains_and_no_bit_of_the_rest(stages):
    base, first, second = map(leaves, stages)
    assert base.keys() == first.keys() == second.keys()
    stays = {"vision": (True, True), "projector": (False, False), "llm": (True, False)}
    for path, before in base.items():
        after, last = first[path].tobytes(), second[path].tobytes()
        found = before.tobytes() == after, after == last
        assert found == stays[path.partition("/")[0]], path


def test_epochs_say_how_many_steps_there_are_and_both_stages_learn(stages):
    for workdir in stages[1:]:
        losses = {line["step"]: line["loss"] for line in read_metrics(workdir) if "loss" in line}
        assert max(losses) == 12
        assert losses[12] < losses[1]
    trained, moments = manifests(stages[2], 12)
    assert {path.partition("/")[0] for path in trained} == {"projector", "llm"}
    assert {entry["dtype"] for entry in trained.values()} == {"float32"}
    assert len([path for path in moments if "mu" in path]) == len(trained)


def test_a_run_is_asked_as_it_was_trained(stages):
    """Template and crop are those of its training; the first stage answers otherwise."""
    image = np.full((20, 30, 3), (220, 30, 30), np.uint8)
    formats, answers = [], []
    for workdir in stages[1:]:
        blip = jax_instructblip.load(workdir)
        formats.append(blip.text.input_format)
        answers += blip.generate([image], [QUESTION], max_new_tokens=4)
    assert formats == [InputFormat("v1", image_crop="pad", limit=300)] * 2
    assert answers[0].logprob != answers[1].logprob
