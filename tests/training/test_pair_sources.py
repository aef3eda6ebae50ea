"""The pairs of BLIP-2's first two stages as sources: tars as they are, or prepared."""

import types

import numpy as np
import pytest

from configs import blip2_pretraining
from jax_instructblip.backbones.stage1 import write_stage1
from jax_instructblip.checkpoint import read_config
from jax_instructblip.data.datasets import ALL, PRETRAINING
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.data.prepare import shards
from jax_instructblip.data.sources import open_records
from jax_instructblip.evaluation import validation
from jax_instructblip.models.variants import Variant
from jax_instructblip.training.config_fields import check_config
from jax_instructblip.training.config_file import change_fields, load_config
from jax_instructblip.training.setup import read_batches, read_mixture, read_validation_records
from tests.helpers.raw_layouts import write_all
from tests.helpers.tars import entry, picture, write_shards, write_tar
from tests.helpers.tiny import write_base

BATCH, STEPS = 4, 6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    write_stage1(write_base(folder / "instructed", "t5"), folder / "stage1", features=12)
    return folder / "stage1"


def configure(paths, **fields):
    """The first stage of the paper on these sources alone."""
    config = load_config("configs/blip2_stage1.py")
    fields = {"data.batch_size": BATCH, "train.steps": STEPS, "text.caption_limit": 8} | fields
    for name in blip2_pretraining.PAIRS:
        fields[f"data.sources.{name}.path"] = str(paths.get(name, ""))
    return change_fields(config, fields)


def batches(base, config, rows=None):
    variant = Variant.from_dict(read_config(base)["variant"])
    start = types.SimpleNamespace(folder=base, variant=variant, input_format=InputFormat())
    rows = np.arange(BATCH) if rows is None else rows
    return read_batches(config, read_mixture(config), start, rows)


@pytest.mark.parametrize("stage", ["blip2_stage1", "blip2_stage2", "blip2_stage2_flan_t5"])
def test_lines_of_captions_need_no_prompt(stage, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    lines = tmp_path / "pairs.jsonl"
    lines.write_text('{"image": "a.png", "answer": "two cups on a table"}\n')
    fields = {f"data.sources.{name}.path": "" for name in blip2_pretraining.PAIRS}
    fields["data.sources.coco_caption.path"] = str(lines)
    mixture = read_mixture(change_fields(load_config(f"configs/{stage}.py"), fields))
    source, record = mixture.record(0)
    prompt, answer = mixture.instruct(source, record, np.random.default_rng(0))
    assert f"{prompt} {answer}".strip() == "two cups on a table"
    assert bool(prompt) == (stage == "blip2_stage2_flan_t5")


def test_a_first_stage_needs_no_prompts_whatever_its_config_says(base, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    lines = tmp_path / "pairs.jsonl"
    lines.write_text('{"image": "a.png", "answer": "two cups on a table"}\n')
    fields = {"data.sources.coco_caption.templates": "", "validation.path": str(lines)}
    config = configure({"coco_caption": lines}, **fields)
    for prompt, checkpoint, fine in (
        ("", base, True),
        ("", base.parent / "instructed", False),
        ("a photo of", base.parent / "instructed", True),
    ):
        config = change_fields(
            config, {"model.checkpoint": str(checkpoint), "validation.prompt": prompt}
        )
        if fine:
            assert len(read_validation_records(config)) == 1
        else:
            with pytest.raises(ValueError, match="prompt is missing"):
                read_validation_records(config)
    with pytest.raises(ValueError, match="prompt is missing"):
        read_mixture(config)
    assert len(read_mixture(change_fields(config, {"model.checkpoint": str(base)})).sources) == 1


@pytest.mark.parametrize(
    "name, batch, steps, trainable, final",
    [
        ("blip2_stage1", 1_680, 250_000, ("qformer", "heads"), 0.0),
        ("blip2_stage2", 1_920, 80_000, ("qformer",), 5e-5),
        ("blip2_stage2_flan_t5", 1_520, 80_000, ("qformer",), 5e-5),
    ],
)
def test_the_numbers_of_the_paper(name, batch, steps, trainable, final):
    config = load_config(f"configs/{name}.py")
    check_config(config)
    assert (config.data.batch_size, config.train.steps) == (batch, steps)
    assert config.model.trainable == trainable
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.final_learning_rate) == (1e-4, final)
    assert (optimizer.warmup_steps, optimizer.b1, optimizer.b2) == (2_000, 0.9, 0.98)
    assert set(config.data.sources) == {"coco_caption", *PRETRAINING} <= set(ALL)
    assert {source.path for source in config.data.sources.values()} == {
        f"data/{pairs}" for pairs in blip2_pretraining.PAIRS
    }


def test_shares_are_those_of_the_sizes(tmp_path):
    write_all(tmp_path, ["coco_caption"])
    shards.prepare(ALL["coco_caption"], tmp_path / "coco_caption", tmp_path / "data")
    tars = write_shards(tmp_path / "sbu", (6, 4))
    config = configure({"coco_caption": tmp_path / "data/coco_caption", "sbu": tars})
    mixture = read_mixture(config)
    assert [(source.name, source.family) for source in mixture.sources] == [
        ("coco_caption", "image captioning"),
        ("sbu", ""),
    ]
    np.testing.assert_allclose(mixture.shares, [0.8, 0.2])  # 40 captions and 10 pairs


def test_prepared_pairs_are_trained_on_without_being_held_in(tmp_path):
    raw = write_shards(tmp_path / "raw", (3,))
    shards.prepare(PRETRAINING["cc3m"], raw, tmp_path / "data")
    (source,) = read_mixture(configure({"cc3m": tmp_path / "data/cc3m"})).sources
    assert (source.name, source.family) == ("cc3m", "image-caption pairs")


@pytest.mark.parametrize("prepared", [True, False])
def test_pairs_validate_the_first_stage(prepared, tmp_path):
    path = write_shards(tmp_path / "raw", (3,))
    if prepared:
        path = shards.prepare(PRETRAINING["cc3m"], path, tmp_path / "data")
    records, _ = open_records(path, "train")
    validation.check(records, str(path), "train")


def test_tars_and_what_is_prepared_of_them_make_the_same_batches(base, tmp_path):
    raw = write_shards(tmp_path / "raw", (7, 6))
    prepared = shards.prepare(PRETRAINING["cc3m"], raw, tmp_path / "data", shard_size=5)
    whole = batches(base, configure({"cc3m": prepared}))
    expected = [whole[step] for step in range(STEPS)]
    for hosts in (1, 2):
        for first in (0, 4):  # a run that goes on opens the tars anew
            parts = [
                batches(base, configure({"cc3m": raw}), rows)
                for rows in np.split(np.arange(BATCH), hosts)
            ]
            for step in range(first, STEPS):
                made = [part[step] for part in parts]
                for key in expected[step].keys() - {"image_id"}:  # of bytes there, of names here
                    together = np.concatenate([each[key] for each in made])
                    np.testing.assert_array_equal(together, expected[step][key], err_msg=key)
    assert not any(batch["replaced"].any() for batch in expected)


def test_entries_that_are_no_pair_are_replaced_and_counted(base, tmp_path, caplog):
    raw = write_shards(tmp_path / "raw", (3,))
    write_tar(raw / "00001.tar", entry("0", None) + entry("1", "a dog", jpg=picture(0)[:40]))
    config = configure({"laion": raw})
    made = batches(base, config)
    replaced = np.concatenate([made[step]["replaced"] for step in range(STEPS)])
    assert replaced.any()
    assert "00001/0" in caplog.text and "its caption is blank" in caplog.text
    assert "00001.tar:1.jpg: damaged" in caplog.text
    again = batches(base, config)[STEPS - 1]
    np.testing.assert_array_equal(again["captions"], made[STEPS - 1]["captions"])
