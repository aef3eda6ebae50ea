import subprocess
import sys
import textwrap

import numpy as np
import pytest

from jax_instructblip.checkpoint import read_config
from jax_instructblip.data.batch import sample_sizes
from jax_instructblip.data.loader import HOST_KEYS, load
from jax_instructblip.data.mixture import Mixture, Source
from jax_instructblip.data.records import read_jsonl
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.data.train_batches import TrainBatches
from jax_instructblip.models.variants import Variant
from jax_instructblip.parallel.mesh import batch_sharding, make_mesh
from tests.helpers.tiny import write_base, write_data


def make_batches(base, data, steps=6):
    variant = Variant.from_dict(read_config(base)["variant"])
    limits = {"qformer_limit": 16, "prompt_limit": 16, "answer_limit": 6}
    return TrainBatches(
        Mixture([Source("colors", read_jsonl(data), "")], 0),
        TextProcessor.load(base, variant, **limits),
        batch_size=4,
        steps=steps,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    return write_base(folder / "base"), write_data(folder / "data")


@pytest.fixture(scope="module")
def batches(files):
    return make_batches(*files)


@pytest.mark.parametrize("settings", [{}, {"threads": 1, "ahead": 1}, {"start": 4}, {"start": 6}])
def test_yields_every_batch_in_order(batches, settings):
    sharding = batch_sharding(make_mesh())
    start = settings.get("start", 0)
    loaded = list(load(batches, sharding, **settings))
    assert len(loaded) == 6 - start
    for step, (batch, counts) in enumerate(loaded, start=start):
        expected = batches[step]
        held, positions = counts.pop("text")
        assert held == (expected["segments"] > 0).sum() + expected["qformer_mask"].sum()
        assert positions == expected["tokens"].size + expected["qformer_tokens"].size
        np.testing.assert_array_equal(counts.pop("sizes"), sample_sizes(expected))
        widths = [expected[name].shape[1] for name in ("slots", "targets")]
        assert counts.pop("row").tolist() == widths
        assert set(counts) == set(HOST_KEYS)
        assert set(batch) | set(counts) == set(expected)
        for key, value in batch.items():
            assert value.sharding == sharding
            np.testing.assert_array_equal(value, expected[key], err_msg=key)
        for key, value in counts.items():
            np.testing.assert_array_equal(value, expected[key], err_msg=key)


WORKERS = """
import sys
import numpy as np
from jax_instructblip.data.loader import load
from jax_instructblip.parallel.mesh import batch_sharding, make_mesh
from tests.data.test_loader import make_batches

if __name__ == "__main__":
    batches = make_batches(sys.argv[1], sys.argv[2])
    loaded = list(load(batches, batch_sharding(make_mesh()), start=1, workers=2))
    assert len(loaded) == 5
    for step, (batch, _) in enumerate(loaded, start=1):
        for key, value in batch.items():
            assert (np.asarray(value) == batches[step][key]).all(), (step, key)
    print("same")
"""


def test_worker_processes_change_nothing(files, tmp_path):
    script = tmp_path / "workers.py"  # a file: the workers import it
    script.write_text(textwrap.dedent(WORKERS))
    done = subprocess.run(
        [sys.executable, str(script), *map(str, files)],
        capture_output=True,
        text=True,
        timeout=600,
        env=_environment(),
    )
    assert done.stdout.endswith("same\n"), done.stderr


def _environment():
    import os
    from pathlib import Path

    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
