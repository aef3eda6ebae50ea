"""BLIP-2's first stage on two processes: the losses of one process with all devices."""

import numpy as np
import pytest

from jax_instructblip.backbones.stage1 import write_stage1
from jax_instructblip.training.metrics import read_metrics
from tests.helpers.tiny import compile_cache, write_base, write_data
from tests.parallel.test_processes import ended, start

pytestmark = pytest.mark.full  # several processes, which compile: a minute on two idle cores
TOLERANCE = 1e-5  # of losses near 3, in float32, summed in another order
TERMS = ("loss", "itc", "itm", "itg")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage1_processes")
    write_stage1(write_base(folder / "base", "t5"), folder / "stage1", features=12)
    with compile_cache(folder / "compiled"):
        yield folder / "stage1", write_data(folder / "data", count=16)


def words(files, workdir, **fields):
    base, data = files
    values = {
        "workdir": workdir,
        "model.checkpoint": base,
        "model.trainable": "('qformer','heads')",
        "model.dtype": "float32",
        "model.frozen_dtype": "float32",
        "data.sources.mine.path": data,
        "data.batch_size": 8,
        "data.threads": 1,
        "text.caption_limit": 8,
        "train.steps": 4,
        "train.log_every": 1,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 1,
        "checkpoints.every": 4,
        "validation.path": "",
    }
    overrides = [f"--config.{name}={value}" for name, value in (values | fields).items()]
    return ["train", "--config", "configs/custom_jsonl.py", *overrides]


def losses(files, workdir, processes, devices, **fields):
    found = ended(start(processes, devices, words(files, workdir, **fields)))
    assert [code for _, code in found] == [0] * processes, "\n".join(said for said, _ in found)
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    return np.array([[line[term] for term in TERMS] for line in lines])


@pytest.mark.parametrize("fsdp", [1, 2])
def test_two_processes_contrast_the_whole_batch(files, tmp_path, fsdp):
    """Similarities and negatives are of the global batch: a process alone has half of the pairs."""
    fields = {"mesh.fsdp": fsdp}
    one = losses(files, tmp_path / "one", 1, 4, **fields)
    two = losses(files, tmp_path / "two", 2, 2, **fields)
    np.testing.assert_allclose(two, one, atol=TOLERANCE)
    assert np.ptp(one[:, 0]) > 100 * TOLERANCE
    other = losses(files, tmp_path / "other", 1, 4, **{**fields, "seed": 1})
    assert np.abs(other - one).max() > 100 * TOLERANCE
