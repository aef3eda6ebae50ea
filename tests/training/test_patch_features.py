"""Training on patch features that were written before is training on pixels, without the tower."""

import functools
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from configs import blip2_stage1
from jax_instructblip import checkpoint
from jax_instructblip.__main__ import main
from jax_instructblip.atomic import sole_writer
from jax_instructblip.data import images, spec
from jax_instructblip.data.batch import collate
from jax_instructblip.data.loader import load
from jax_instructblip.inference import feature_files
from jax_instructblip.inference.loading import read_source
from jax_instructblip.models import flops
from jax_instructblip.models.released import VARIANTS
from jax_instructblip.models.vision import VisionTransformer
from jax_instructblip.models.vlm import VisionLanguageModel, param_shapes
from jax_instructblip.parallel.mesh import batch_sharding, make_mesh
from jax_instructblip.planning import plan
from jax_instructblip.planning.job import read_job
from jax_instructblip.training import loop, setup
from jax_instructblip.training import patch_features as run_features
from jax_instructblip.training.metrics import read_metrics
from jax_instructblip.training.objective import LanguageObjective
from jax_instructblip.training.optimizer import adamw
from jax_instructblip.training.state import create_state, partition
from jax_instructblip.training.step import train_step
from tests.helpers.planned import job_of
from tests.helpers.tiny import QUESTION, compile_cache, tiny_variant, write_base, write_data
from tests.training.test_loop import losses, make_config, run

# InstructBLIP in every run of the tests, LLaVA and BLIP-2's second stage with the full ones.
CHEAP = ("t5", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("llava", "opt")))
CHAT = {"chat.template": "v1", "chat.limit": 300, "model.trainable": ("projector",)}
STILL = {"model.qformer_dropout": 0.0, "model.llm_dropout": 0.0}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    with compile_cache(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The folder of a tiny model of each kind, by kind."""
    folder = tmp_path_factory.mktemp("bases")
    return functools.cache(lambda kind: write_base(folder / kind, kind))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two questions about each of six images, one about two of them, one damaged image."""
    folder = tmp_path_factory.mktemp("data")
    lines = write_data(folder, count=6).read_text().splitlines()
    rows = [json.loads(line) for line in lines] * 2
    rows.append({**rows[0], "image": "damaged.png"})
    (folder / "damaged.png").write_bytes(b"no image")
    pair = {name: rows[0][name] for name in ("prompt", "answer")} | {"images": ["1.png", "2.png"]}
    rows.append(pair)
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(base, data, folder, kind="t5", **fields):
    chat = CHAT if kind == "llava" else STILL
    own = {"data.augment": False, "train.steps": 2, "checkpoints.every": 2, "data.batch_size": 8}
    return make_config((base, data), folder, **(own | chat | fields))


def words(config, folder):
    """The words of a command that reads this config."""
    path = folder / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"get_config = lambda: ConfigDict({config.to_dict()!r}).lock()\n"
    )
    return [f"--config={path}"]


@pytest.fixture(scope="module")
def written(bases, data, tmp_path_factory):
    """The folder of the features of `data` by the T5 model, in shards of three images."""
    folder = tmp_path_factory.mktemp("features")
    config = config_of(bases("t5"), data, folder, **{"data.features": str(folder / "out")})
    assert main(["features", *words(config, folder), "--shard_size=3", "--batch_size=2"]) == 0
    return folder / "out"


def round_patches(call, args, kwargs, context):
    """Runs a vision tower as if its result had been stored: rounded to bfloat16."""
    out = call(*args, **kwargs)
    tower = isinstance(context.module, VisionTransformer) and context.method_name == "__call__"
    return out.astype(jnp.bfloat16).astype(jnp.float32) if tower else out


@pytest.mark.parametrize("kind", CHEAP)
def test_a_run_has_the_losses_of_one_whose_tower_is_rounded(bases, data, tmp_path, kind):
    """The stored bfloat16 is the only difference: losses agree to 1e-5 with a rounded tower's.

    Rows are packed, a record has two images, one a damaged one, which both runs replace alike.
    """
    fields = {"data.samples_per_row": 2, "data.features": str(tmp_path / "features")}
    config = config_of(bases(kind), data, tmp_path / "read", kind, **fields)
    assert main(["features", *words(config, tmp_path)]) == 0
    found = losses(run(config))
    plain = config_of(
        bases(kind), data, tmp_path / "plain", kind, **(fields | {"data.features": ""})
    )
    with nn.intercept_methods(round_patches):
        expected = losses(run(plain))
    assert list(found) == [1, 2]
    assert found == pytest.approx(expected, rel=0, abs=1e-5)
    lines = [read_metrics(tmp_path / name)[-1] for name in ("read", "plain")]
    assert lines[0]["gradient_norm"] == pytest.approx(lines[1]["gradient_norm"], rel=1e-4)
    assert lines[0]["replaced"] == lines[1]["replaced"] > 0


@pytest.mark.parametrize("kind", CHEAP)
def test_a_step_on_patch_features_has_no_vision_tower(kind):
    """Neither its weights nor its FLOPs: those of the products are the count without it."""
    variant = tiny_variant(kind)
    visual, rows, text, answer = variant.visual_tokens, 3, 11, 10
    sizes = {"G": rows, "L": text, "X": visual + text, "A": answer, "U": answer}
    shapes = spec.shapes(variant, sizes, patches=True)
    batch = {name: jax.ShapeDtypeStruct(*each) for name, each in shapes.items()}
    assert batch["patches"].shape == (rows, 1, variant.vision.tokens, variant.vision.width)
    assert batch["patches"].dtype == jnp.bfloat16 and "images" not in batch
    chosen, frozen = partition(param_shapes(variant), (variant.bridge.key,))
    del frozen["vision"]
    rate = lambda _: 1e-2
    state = jax.eval_shape(lambda tree: create_state(tree, adamw(rate)), chosen)
    objective = LanguageObjective(VisionLanguageModel(variant))
    step = functools.partial(train_step, objective=objective, optimizer=adamw(rate), schedule=rate)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    found, _ = flops.counted(step, state, frozen, batch, rng)
    count = functools.partial(flops.analytic, variant, rows, text, text, answer)
    assert 0.98 * count(patches=True) < found <= 1.02 * count(patches=True)
    tower = count() - count(patches=True)
    assert tower > 0.05 * found  # the margin above does not hide it
    sample = np.array([[1, text, visual + text, answer]])
    useful = [
        flops.useful(variant, sample, (variant.bridge.key,), patches=p) for p in (False, True)
    ]
    assert useful[0] - useful[1] == tower // rows


def test_a_plan_is_of_that_step():
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    plain = job_of(tiny_variant("t5"))
    job = job_of(tiny_variant("t5"), **{"data.augment": False, "data.features": "features"})
    state, frozen, batch, _ = plan.job_arguments(job, mesh)
    assert "vision" in plan.job_arguments(plain, mesh)[1] and "vision" not in frozen
    assert batch["patches"].dtype == jnp.bfloat16 and "images" not in batch
    assert job.floor() < plain.floor()
    # Whoever validates asks questions about pixels, so the tower's weights stay.
    fields = {"data.augment": False, "data.features": "f", "validation.path": "shapes"}
    job = job_of(tiny_variant("t5"), **fields)
    assert "vision" in plan.job_arguments(job, mesh)[1] and job.patches
    decoding = job_of(tiny_variant("t5"), "decode", **fields)
    assert "images" in plan.job_arguments(decoding, mesh)[1]


def test_an_image_has_its_features_once(bases, data, written, tmp_path):
    """Eight files are seven images, one of them damaged; the tower's values are the stored ones."""
    facts = json.loads((written / "features.json").read_text())
    shards = sorted(path.name for path in written.glob("*.arrayrecord"))
    assert (facts["count"], facts["form"], len(shards)) == (7, "patches", 3)
    config = config_of(bases("t5"), data, tmp_path, **{"data.features": str(written)})
    stored = run_features.open_features(config)
    assert stored is not None
    initial = run_features.read_initial(config, make_mesh(devices=jax.devices()[:1]))
    assert "vision" not in initial.frozen
    tree = checkpoint.read_tree(bases("t5"), place=lambda path, array: jnp.asarray(array))
    pixels = images.resize_squash(images.decode(data.parent / "3.png"), 28)
    tower = VisionTransformer(initial.variant.vision, jnp.float32)
    expected = np.asarray(tower.apply({"params": tree["vision"]}, jnp.asarray(pixels)[None]))[0]
    # Found by its content, wherever it lies and in whatever form.
    shutil.copy(data.parent / "3.png", tmp_path / "moved.png")
    for source in (str(tmp_path / "moved.png"), (data.parent / "3.png").read_bytes()):
        found = stored.read(source, "a record")
        assert found.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found, expected.astype(ml_dtypes.bfloat16))
    with pytest.raises(images.ImageError, match="damaged.png: .*not an image that can be read"):
        stored.read(b"no image", "a record")


def test_a_batch_reaches_the_devices_in_bfloat16(bases, data, written, tmp_path):
    """A text alone has an unused image of zeros; wrong sizes are named."""
    config = config_of(bases("t5"), data, tmp_path, **{"data.features": str(written)})
    mesh = make_mesh(devices=jax.devices()[:1])
    initial = run_features.read_initial(config, mesh)
    opened = run_features.open_features(config)
    batches = setup.read_batches(
        config, setup.read_mixture(config), initial, np.arange(8), features=opened
    )
    batch, _ = next(iter(load(batches, batch_sharding(mesh))))
    assert batch["patches"].dtype == jnp.bfloat16
    assert batch["patches"].shape == (8, 1, 5, 22)
    example = {"patches": np.zeros((0, 5, 22), ml_dtypes.bfloat16), "tokens": np.arange(3)}
    texts = collate([example], visual_tokens=7, lengths={"images": 1})
    assert texts["patches"].shape == (1, 1, 5, 22) and not texts["patches"].any()
    spec.check_arrays({name: np.asarray(leaf) for name, leaf in batch.items()}, initial.variant)
    wrong = {name: np.asarray(leaf) for name, leaf in batch.items()}
    wrong["patches"] = wrong["patches"][..., :9]
    with pytest.raises(ValueError, match="patches has D = 9, but the model has 22"):
        spec.check_arrays(wrong, initial.variant)


def test_an_image_without_features_ends_the_run_and_names_its_record(
    bases, data, written, tmp_path
):
    """A file that was added, and one that was changed since."""
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "new.png")
    row = {"id": "the new one", "image": "new.png", "prompt": QUESTION, "answer": "red"}
    (tmp_path / "more.jsonl").write_text(json.dumps(row) + "\n")
    fields = {"data.features": str(written)}
    config = config_of(bases("t5"), tmp_path / "more.jsonl", tmp_path / "run", **fields)
    with pytest.raises(ValueError, match="the new one: .*/out has no features of .*new.png"):
        loop.run(config)


def other_tower(base, folder):
    """The folder of a checkpoint of the same sizes; one weight of its vision tower differs."""
    change = lambda path, array: np.array(array) + (path == "vision/cls")
    tree = checkpoint.read_tree(base, place=change)
    facts = {"variant": read_source(base).variant.to_dict(), "source": {}}
    extra = lambda partial: checkpoint.write_config(partial, facts)
    checkpoint.write_tree(folder / "other", checkpoint.flatten(tree).items(), extra=extra)
    return str(folder / "other")


OTHERS = {  # a changed field -> what the error says of it
    "data.crop": ("pad", "image_crop was 'squash', now 'pad'"),
    "data.exif": (False, "exif was True, now False"),
    "model.image_size": (42, "vision was .*'image_size': 28.*now .*'image_size': 42"),
    "model.dtype": ("bfloat16", "dtype was 'float32', now 'bfloat16'"),
    "model.frozen_dtype": ("int8", "frozen_dtype was 'float32', now 'int8'"),
}


@pytest.mark.parametrize("field", [*OTHERS, "model.checkpoint"])
def test_features_of_something_else_are_refused(bases, data, written, tmp_path, field):
    fields = {"data.features": str(written)}
    config = config_of(bases("t5"), data, tmp_path, **fields)
    assert run_features.open_features(config) is not None
    if field in OTHERS:
        value, message = OTHERS[field]
    else:
        value, message = other_tower(bases("t5"), tmp_path), "weights was '.*', now '"
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=f"config.data.features: .*something else.*\n  {message}"):
        run_features.open_features(config)


def test_an_interrupted_export_is_resumed_and_not_read_before(
    bases, data, written, tmp_path, monkeypatch
):
    shutil.copytree(written, tmp_path / "out")
    lost = tmp_path / "out" / "00001-of-00003.arrayrecord"
    lost.unlink()
    config = config_of(bases("t5"), data, tmp_path, **{"data.features": str(tmp_path / "out")})
    with pytest.raises(ValueError, match="lacks 1 of 3 shards, such as 00001-of-00003"):
        run_features.open_features(config)
    made = []
    write = feature_files.write_shard
    spy = lambda path, *rest: made.append(path.name) or write(path, *rest)
    monkeypatch.setattr(run_features, "write_shard", spy)
    run_features.write_features(config, batch_size=2, shard_size=3)
    assert made == [lost.name]
    assert lost.read_bytes() == (written / lost.name).read_bytes()
    with pytest.raises(ValueError, match="shard_size was 3, now 4"):
        run_features.write_features(config, batch_size=2, shard_size=4)


def test_sizes_and_other_writers_are_checked_first(bases, data, written, tmp_path, capsys):
    out = tmp_path / "out"
    named = words(config_of(bases("t5"), data, tmp_path, **{"data.features": str(out)}), tmp_path)
    for flag, message in (
        ("--shard_size=0", "shard_size is 0, expected at least 1"),
        ("--batch_size=0", "batch_size is 0, expected at least 1"),
    ):
        assert main(["features", *named, flag]) == 1
        assert message in capsys.readouterr().err
    with sole_writer(out):
        assert main(["features", *named]) == 1
    assert "another process writes to" in capsys.readouterr().err
    assert not out.exists()


def test_damaged_files_are_named(bases, data, written, tmp_path):
    def opened(name, content):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(written, tmp_path / "out")
        path = tmp_path / "out" / name
        path.unlink() if content is None else path.write_bytes(content)
        fields = {"data.features": str(tmp_path / "out")}
        return run_features.open_features(config_of(bases("t5"), data, tmp_path, **fields))

    with pytest.raises(FileNotFoundError, match="config.data.features: .*no features.json"):
        opened("features.json", None)
    with pytest.raises(ValueError, match="images.npy cannot be used"):
        opened("images.npy", b"PK")
    with pytest.raises(ValueError, match="damaged shard"):
        opened("00001-of-00003.arrayrecord", b"")
    whole = (written / "00000-of-00003.arrayrecord").read_bytes()
    middle = len(whole) // 2
    spoilt = whole[:middle] + bytes(99) + whole[middle + 99 :]
    with pytest.raises(ValueError, match="damaged"):
        features = opened("00000-of-00003.arrayrecord", spoilt)
        assert features is not None
        for number in range(6):
            features.read(str(data.parent / f"{number}.png"), "a record")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.augment": True}, "config.data.features is 'f', config.data.augment is True"),
        (
            {"model.trainable": ("qformer", "vision")},
            "config.data.features is 'f', config.model.trainable is .*'vision'",
        ),
    ],
)
def test_what_changes_the_patches_is_refused(bases, data, tmp_path, fields, message):
    config = config_of(bases("t5"), data, tmp_path, **({"data.features": "f"} | fields))
    with pytest.raises(ValueError, match=message):
        loop.run(config)


def test_a_first_stage_reads_pixels():
    config = blip2_stage1.get_config()
    config.data.augment, config.data.features = False, "f"
    with pytest.raises(ValueError, match="config.data.features is 'f': the first stage of BLIP-2"):
        read_job(config, VARIANTS["blip2-stage1"])
