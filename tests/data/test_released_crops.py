"""Training pixels of the paper's configs beside torchvision's published rule and Pillow alone.

`get_params` is written as torchvision publishes it (`RandomResizedCrop.get_params`), with the draws
handed in; `released` is the released transform, `blip2_image_train`, up to the normalisation.
"""

import io
import json
import math
import pathlib
import types

import numpy as np
import pytest
from PIL import Image

from jax_instructblip.checkpoint import read_config
from jax_instructblip.data import images
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.data.mixture import Mixture, Source
from jax_instructblip.data.records import Record
from jax_instructblip.models.variants import Variant
from jax_instructblip.training import earlier_run
from jax_instructblip.training.config_file import load_config
from jax_instructblip.training.setup import read_batches
from tests.data.test_images import encoded
from tests.helpers.tiny import write_base

SCALE, RATIO = (0.5, 1.0), (3.0 / 4.0, 4.0 / 3.0)
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
NAMES = ("flan_t5_xl", "flan_t5_xxl", "vicuna_7b", "vicuna_13b")


def get_params(width, height, rng):
    """Top, left, height and width of the part."""
    area = height * width
    log_ratio = np.log(RATIO)
    for _ in range(10):
        target_area = area * rng.uniform(SCALE[0], SCALE[1])
        aspect_ratio = math.exp(rng.uniform(log_ratio[0], log_ratio[1]))
        w = int(round(math.sqrt(target_area * aspect_ratio)))
        h = int(round(math.sqrt(target_area / aspect_ratio)))
        if 0 < w <= width and 0 < h <= height:
            i = int(rng.integers(0, height - h + 1))
            j = int(rng.integers(0, width - w + 1))
            return i, j, h, w
    in_ratio = float(width) / float(height)
    if in_ratio < min(RATIO):
        w = width
        h = int(round(w / min(RATIO)))
    elif in_ratio > max(RATIO):
        h = height
        w = int(round(h * max(RATIO)))
    else:
        w = width
        h = height
    i = (height - h) // 2
    j = (width - w) // 2
    return i, j, h, w


def released(photo, size, rng):
    """Pixels as the released code makes them, given the same random numbers."""
    with Image.open(io.BytesIO(photo)) as opened:
        image = opened.convert("RGB")
    i, j, h, w = get_params(*image.size, rng)
    part = image.crop((j, i, j + w, i + h)).resize((size, size), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(part)


def test_parts_are_those_of_the_published_rule():
    """Images of all shapes, among them those in which no part fits and the middle is taken."""
    sizes = np.random.default_rng(0).integers(1, 700, (400, 2)).tolist()
    sizes += [(1, 1), (1, 1000), (1000, 1), (3, 4), (4, 3), (30, 750), (750, 31), (640, 480)]
    middles = 0
    for width, height in sizes:
        for seed in range(5):
            rngs = [np.random.default_rng([seed, width, height]) for _ in range(2)]
            i, j, h, w = get_params(width, height, rngs[0])
            found = images._random_box(width, height, rngs[1], SCALE, RATIO)
            assert found == (j, i, w, h), (width, height, seed)
            assert rngs[0].random() == rngs[1].random()  # the mirror is drawn from the same place
            middles += abs(math.log(w / h)) > math.log(4 / 3) - 0.1 and w in (width, height)
    assert middles > 100


@pytest.fixture(scope="module")
def photos(shared):
    found = [path.read_bytes() for path in sorted((shared / "data/images/coco").glob("*.jpg"))]
    assert len(found) == 18
    return found


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny model whose pictures are as large as the paper's."""
    folder = write_base(tmp_path_factory.mktemp("crops") / "base", "t5")
    variant = Variant.from_dict(read_config(folder)["variant"])
    return types.SimpleNamespace(
        folder=folder,
        variant=variant.replace(**{"vision.image_size": 224}),
        input_format=InputFormat(),
    )


@pytest.mark.parametrize("name", NAMES)
def test_training_pixels_of_the_papers_configs_are_the_released_ones(photos, start, name):
    """Photographs through the run's own batches: any shortcut of the decoder would show."""
    config = load_config(str(CONFIGS / f"paper_{name}.py"))
    with config.unlocked():
        config.data.batch_size = len(photos)
        config.data.samples_per_row = 1  # packed rows are in another order
    photo_of = {f"photo {number}": photo for number, photo in enumerate(photos)}
    records = [Record(id, (photo,), "what is it?", ("red",)) for id, photo in photo_of.items()]
    mixture = Mixture([Source("photos", records, "digest")], config.seed)
    batches = read_batches(config, mixture, start, np.arange(len(photos)))
    found = batches[0]["images"]
    mirrored = 0
    for place, id in enumerate(batches.ids(0)):
        rng = mixture.rng(place, 0, use="image")
        expected = released(photo_of[id], 224, rng)
        np.testing.assert_array_equal(found[place].reshape(expected.shape), expected, id)
        rng = mixture.rng(place, 0, use="image")
        get_params(*Image.open(io.BytesIO(photo_of[id])).size, rng)
        mirrored += rng.random() < 0.5
    assert 0 < mirrored < len(photos)


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        *(("PNG", mode) for mode in ("RGB", "L", "LA", "P", "RGBA", "1")),
        *(("GIF", mode) for mode in ("L", "P", "1")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    ],
)
def test_files_of_all_kinds_are_cropped_as_released(format, mode):
    y, x = np.mgrid[:130, :170]
    picture = Image.fromarray(np.stack([x, y, x + y], axis=-1).astype(np.uint8)).convert(mode)
    photo = encoded(picture, format=format)
    rngs = [np.random.default_rng(7) for _ in range(2)]
    found = images.random_resized_crop_flip(photo, 96, rngs[0])
    np.testing.assert_array_equal(found, released(photo, 96, rngs[1]))


def test_the_config_of_a_run_may_say_infinity(tmp_path):
    """`--config.data.min_decode_ratio=inf` decodes whole, too; the run's folder has it so."""
    config = load_config(str(CONFIGS / "custom_jsonl.py"))
    config.data.min_decode_ratio = math.inf
    fields = json.loads(config.to_json())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": fields}))
    (tmp_path / "checkpoints").mkdir()
    assert earlier_run.changes(tmp_path, fields) == []
    assert earlier_run.read_run(tmp_path) == {"config": fields}
