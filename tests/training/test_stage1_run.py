"""The first stage as a run: its base, its checkpoints, and the stages that start from it."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jax_instructblip
from configs import common
from jax_instructblip import checkpoint
from jax_instructblip.__main__ import main
from jax_instructblip.backbones.stage1 import write_stage1
from jax_instructblip.evaluation import validation
from jax_instructblip.inference.loading import read_params, read_source
from jax_instructblip.inference.retrieval import Retriever
from jax_instructblip.training import loop
from jax_instructblip.training.initial import load_initial
from jax_instructblip.training.metrics import read_metrics
from tests.helpers.tiny import compile_cache, write_base, write_data

PARTS = ("qformer", "heads")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage1")
    base = write_base(folder / "instructed", "t5")
    write_stage1(base, folder / "base", features=12)
    with compile_cache(folder / "programs"):
        yield folder, base, write_data(folder / "data")


def config(files, workdir, **fields):
    folder, _, data = files
    made = common.get_config()
    with made.unlocked():
        made.data.sources = {"colors": common.source(str(data))}
    values = {
        "workdir": str(workdir),
        "model.checkpoint": str(folder / "base"),
        "model.trainable": PARTS,
        "model.dtype": "float32",
        "model.frozen_dtype": "float32",
        "data.batch_size": 4,
        "data.threads": 1,
        "text.caption_limit": 8,
        "train.steps": 4,
        "train.log_every": 1,
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 1,
        "checkpoints.every": 2,
    }
    made.update_from_flattened_dict(values | fields)
    return made


def leaves(path):
    return checkpoint.flatten(read_params(read_source(path), lambda path, array: array))


def digests(workdir, step):
    folder = Path(workdir) / "checkpoints" / str(step)
    return [checkpoint.manifest_digest(folder / part) for part in ("trainable", "optimizer")]


@pytest.fixture(scope="module")
def run(files):
    """Four steps, validated after the last one."""
    folder, _, data = files
    fields = {"validation.path": str(data), "validation.every": 4, "validation.limit": 8}
    made = config(files, folder / "run", **fields)
    return loop.run(made, evaluate=validation.evaluate)


def test_a_base_has_the_tower_of_another_checkpoint_and_the_rest_is_fresh(files, capsys):
    folder, base, _ = files
    ours, theirs = leaves(folder / "base"), leaves(base)
    assert read_source(folder / "base").variant.kind == "blip2_stage1"
    same = [name for name in theirs if name.startswith("vision/")]
    assert same and all((ours[name] == theirs[name]).all() for name in same)
    assert ours["heads/temp"] == np.float32(0.07)
    assert "qformer/projection/kernel" in theirs.keys() - ours.keys()
    words = ["backbones", "stage1", str(base), str(folder / "again"), "--seed", "0"]
    assert main(words) == 0 and "Q-Former and heads: random" in capsys.readouterr().out
    with pytest.raises(FileExistsError):
        write_stage1(base, folder / "base")


def test_random_words_are_as_large_as_asked(files, tmp_path):
    folder, base, _ = files
    words = ["backbones", "stage1", str(base), str(tmp_path / "large"), "--word_std", "0.5"]
    assert main(words) == 0
    write_stage1(base, tmp_path / "usual")
    large, usual = leaves(tmp_path / "large"), leaves(tmp_path / "usual")
    table = "qformer/text_embed/embedding"
    assert [name for name in usual if (large[name] != usual[name]).any()] == [table]
    assert usual[table].std() == pytest.approx(0.02, rel=0.1)
    assert large[table].std() == pytest.approx(0.5, rel=0.1)
    with pytest.raises(ValueError, match="--word_std is for random .* --bert has trained ones"):
        write_stage1(base, tmp_path / "out", bert=folder, word_std=0.5)


def test_a_run_that_is_taken_up_is_the_whole_run(files, run, tmp_path):
    loop.run(config(files, tmp_path / "parts", **{"train.steps": 2, "optimizer.warmup_steps": 1}))
    loop.run(config(files, tmp_path / "parts"))
    assert digests(tmp_path / "parts", 4) != digests(run, 2)
    whole = config(files, tmp_path / "whole", **{"checkpoints.every": 4})
    assert digests(loop.run(whole), 4) == digests(run, 4)


def test_its_numbers_and_its_validation(run):
    lines = read_metrics(run)
    steps = [line for line in lines if "loss" in line]
    for line in steps:
        assert line["loss"] == pytest.approx(line["itc"] + line["itm"] + line["itg"], abs=1e-4)
        assert line["pairs"] == 4
    (scores,) = [line for line in lines if line.get("validation/recall", 0) and line["step"] == 4]
    both = scores["validation/image_to_text/r1"], scores["validation/text_to_image/r1"]
    assert scores["validation/score"] == pytest.approx(sum(both) / 2)
    assert scores["validation/itc/text_to_image/r10"] == 1.0  # of eight images


def test_a_run_loads_as_a_retriever_and_frozen_weights_are_the_bases(files, run):
    folder, _, data = files
    blip = jax_instructblip.load(run)
    assert isinstance(blip, Retriever)
    images = [str(data.parent / f"{n}.png") for n in range(3)]
    assert blip.itc(images, ["red", "green"]).shape == (3, 2)
    first, tuned = leaves(folder / "base"), leaves(run)
    moved = {name.partition("/")[0] for name in first if (first[name] != tuned[name]).any()}
    assert moved == set(PARTS)


@pytest.mark.full
def test_fine_tuning_for_retrieval_trains_the_tower_on_larger_images(files, run, tmp_path):
    """From a first stage; captions of one image are right for it, all of them."""
    folder, _, _ = files
    fields = {
        "model.init": str(run),
        "model.image_size": 42,
        "model.trainable": ("vision", *PARTS),
        "model.remat.vision": "full",
        "train.steps": 1,
        "train.pairs_by_image": True,
        "optimizer.vision_layer_decay": 0.5,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 0,
    }
    tuned = leaves(loop.run(config(files, tmp_path / "run", **fields)))
    before = leaves(run)
    moved = {name: np.abs(tuned[name] - before[name]) for name in before if "pos" not in name}
    median = lambda name: np.median(moved[name], axis=tuple(range(1, moved[name].ndim)))
    np.testing.assert_allclose(median("vision/layers/mlp/out/kernel"), [0.25e-3, 0.5e-3], rtol=0.05)
    assert np.median(moved["heads/match/kernel"]) == pytest.approx(1e-3, rel=0.05)
    assert tuned["vision/pos_embed"].shape[1] == 10
    images = [Image.new("RGB", (30, 30), (200, 30, 30))] * 2
    assert jax_instructblip.load(tmp_path / "run").itc(images, ["red"]).shape == (2, 1)


def test_instruction_tuning_starts_from_it(files, run):
    """The projection, which the first stage does not have, is the base's; the rest the run's."""
    _, base, _ = files
    initial = load_initial(base, init=run, frozen_dtype=jnp.float32)
    found = checkpoint.flatten(initial.trainable)
    tuned, first = leaves(run), leaves(base)
    for name, leaf in found.items():
        source = first if "projection" in name else tuned
        assert (np.asarray(leaf) == source[name]).all(), name
    (note,) = [each for each in initial.notes if "of another stage" in each]
    assert "lacks projection: from" in note
    blind = load_initial(base, init=run, fields={"qformer.instruction_aware": False})
    assert not any("text_mlp" in name for name in checkpoint.flatten(blind.trainable))


def test_what_cannot_be_trained_so_is_said(files, tmp_path):
    for fields, message in (
        ({"data.batch_size": 1}, "batch_size is 1: a pair is compared with the others"),
        ({"train.accumulate": 2}, "each pair is compared with all others"),
        ({"data.samples_per_row": 2}, "samples_per_row is 2: in the first stage each pair"),
        ({"chat.template": "v1"}, "chat.template is 'v1': in the first stage there are captions"),
        ({"text.caption_limit": 2}, "caption_limit is 2, expected at least 3"),
        ({"model.trainable": ("llm",)}, "llm"),
    ):
        with pytest.raises(ValueError, match=message):
            loop.run(config(files, tmp_path / "run", **fields))


def bert_folder(folder, variant, **sizes):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    c = variant.qformer
    given = dict(
        vocab_size=c.vocab - 1,
        hidden_size=c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        intermediate_size=c.mlp,
        max_position_embeddings=c.max_positions,
    )
    model = transformers.BertModel(transformers.BertConfig(**given | sizes))
    model.save_pretrained(folder)
    return {name: leaf.numpy() for name, leaf in model.state_dict().items()}


def test_a_qformer_starts_from_bert(files, tmp_path):
    _, base, _ = files
    variant = read_source(base).variant
    bert = bert_folder(tmp_path / "bert", variant)
    write_stage1(base, tmp_path / "out", bert=tmp_path / "bert", features=12)
    ours = leaves(tmp_path / "out")
    table = ours["qformer/text_embed/embedding"]
    assert (table[:-1] == bert["embeddings.word_embeddings.weight"]).all()
    for stack, layer in (("cross", 0), ("plain", 1)):
        own = f"qformer/layers/{stack}"
        rise = bert[f"encoder.layer.{layer}.intermediate.dense.weight"].T
        for name in ("text_mlp", "query_mlp"):
            assert (ours[f"{own}/{name}/in/kernel"][0] == rise).all()
        query = bert[f"encoder.layer.{layer}.attention.self.query.weight"]
        width, heads = variant.qformer.width, variant.qformer.heads
        assert (ours[f"{own}/attention/query/kernel"][0] == query.T.reshape(width, heads, -1)).all()
    cross = ours["qformer/layers/cross/cross_attention/key/kernel"]  # which BERT does not have
    assert 0 < np.abs(cross).max() < 1


def test_a_bert_of_other_sizes_is_refused(files, tmp_path):
    _, base, _ = files
    variant = read_source(base).variant
    bert_folder(tmp_path / "bert", variant, num_hidden_layers=1)
    with pytest.raises(ValueError, match="no BERT of these sizes(.|\n)*encoder.layer.1.*missing"):
        write_stage1(base, tmp_path / "out", bert=tmp_path / "bert")
    assert not (tmp_path / "out").exists()
