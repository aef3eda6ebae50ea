"""One flipped bit in any file of a base or a run raises an error, or changes nothing loaded."""

import hashlib
import json
import random

import jax
import numpy as np
import pytest

from jax_instructblip import checkpoint
from jax_instructblip.checkpoint import orbax_leaves
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.inference.loading import base_digest, read_params, read_source
from jax_instructblip.training.checkpoints import Checkpoints
from jax_instructblip.training.optimizer import adamw
from jax_instructblip.training.state import create_state
from tests.helpers.tiny import TEXT, write_base

RNG = jax.random.key(0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base, a run of one step, and what of it both loading and resuming give."""
    folder = tmp_path_factory.mktemp("flips")
    base = write_base(folder / "base")
    source = read_source(base)
    qformer = checkpoint.read_tree(base)["qformer"]
    state = create_state({"qformer": qformer}, adamw(lambda _: 0.1))
    meta = {
        "variant": source.variant.to_dict(),
        "trainable": ["qformer"],
        "base": {"name": "base", "path": str(base), "sha256": base_digest(source)},
        "text": {"qformer_limit": 12},
        "data": {"step": 1, "seed": 0, "fingerprint": "f"},
    }
    manager = Checkpoints(folder / "run" / "checkpoints")
    manager.save(state._replace(step=state.step + 1), RNG, meta)
    manager.wait()
    manager.record_score(1, 0.5)
    manager.wait()
    manager.close()
    return folder, state, meta


def loaded(folder):
    """Everything that answers depend on."""
    source = read_source(folder / "run")
    text = TextProcessor.load(source.folder, source.variant, **source.limits)
    digest = hashlib.sha256()
    keep = lambda path, array: digest.update(f"{path}{array.shape}".encode() + array.tobytes())
    read_params(source, keep)
    ids = [text.prompt(each) for each in (*TEXT, "Unknown words! <s> \u00e9")]
    ids = json.dumps([[value.tolist() for value in each.values()] for each in ids])
    return digest.hexdigest(), source.variant, dict(source.limits), ids


def resumed(folder, like, meta):
    manager = Checkpoints(folder / "run" / "checkpoints")
    state, key, found = manager.restore(1, like, RNG, meta)
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    return leaves, jax.random.key_data(key).tolist(), found


@pytest.mark.parametrize("count", [4, pytest.param(500, marks=pytest.mark.full)])
def test_a_flipped_bit_is_noticed_or_changes_nothing(saved, count, monkeypatch):
    monkeypatch.setattr(orbax_leaves, "SETTLE_SECONDS", 0.0)
    folder, like, meta = saved
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    expected = loaded(folder), resumed(folder, like, meta)
    draw, noticed = random.Random(0), 0
    for _ in range(count):
        path = draw.choice(files)
        before = path.read_bytes()
        place, bit = draw.randrange(len(before)), draw.randrange(8)
        after = bytearray(before)
        after[place] ^= 1 << bit
        path.write_bytes(after)
        where = f"bit {bit} of byte {place} in {path.relative_to(folder)}"
        try:
            assert loaded(folder) == expected[0], where
            assert resumed(folder, like, meta) == expected[1], where  # it reads more files
        except (ValueError, OSError) as error:
            assert str(error), where
            noticed += 1
        path.write_bytes(before)
    assert noticed > 0.9 * count
    assert (loaded(folder), resumed(folder, like, meta)) == expected


def test_a_part_of_another_step_is_refused(saved):
    folder, like, meta = saved
    manager = Checkpoints(folder / "other" / "checkpoints")
    moved = like._replace(params=jax.tree.map(lambda leaf: leaf * 2, like.params))
    moved = moved._replace(optimizer=jax.tree.map(lambda leaf: leaf + 1, moved.optimizer))
    manager.save(moved._replace(step=moved.step + 1), RNG, meta)
    manager.wait()
    one, other = folder / "run" / "checkpoints" / "1", manager.path(1)
    for part in ("trainable", "optimizer"):
        (one / part).rename(folder / "kept")
        (other / part).rename(one / part)
        try:
            with pytest.raises(checkpoint.CheckpointError, match=f"{part} is not what was saved"):
                resumed(folder, like, meta)
            if part == "trainable":
                with pytest.raises(checkpoint.CheckpointError, match="its manifest is another"):
                    loaded(folder)
        finally:
            (one / part).rename(other / part)
            (folder / "kept").rename(one / part)
    resumed(folder, like, meta)
