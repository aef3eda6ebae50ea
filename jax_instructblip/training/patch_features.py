"""Patch features of a run's images: written once by the frozen tower, then read by every run.

    config --its sources--> images, each once --frozen vision tower--> config.data.features

The format is that of `data/patch_features.py`. Every field that changes what the tower sees or
computes is recorded with them, and compared before a run reads them.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_instructblip import checkpoint
from jax_instructblip.atomic import unwritable
from jax_instructblip.data.images import ImageError, content_digest
from jax_instructblip.data.images import Source as Image
from jax_instructblip.data.mixture import Mixture
from jax_instructblip.data.patch_features import (
    FORM,
    INDEX,
    SUFFIX,
    PatchFeatures,
    shard_names,
)
from jax_instructblip.data.train_batches import ImagePreparation
from jax_instructblip.fields import check, whole
from jax_instructblip.files import FileSlice
from jax_instructblip.inference.batching import check_batch_size
from jax_instructblip.inference.feature_files import begin, is_whole, write_shard
from jax_instructblip.inference.loading import Source, base_digest, read_source
from jax_instructblip.models.variants import Variant
from jax_instructblip.models.vision import VisionTransformer
from jax_instructblip.parallel.mesh import batch_sharding
from jax_instructblip.progress import Progress
from jax_instructblip.training import setup
from jax_instructblip.training.config_fields import check_config
from jax_instructblip.training.initial import Initial, load_initial

_HINT = "images is a digest of all images, weights one of the vision tower's"


class _Place(NamedTuple):
    """The place of an image: its source, the index of a record there, the number of the image."""

    source: Sequence[Any]
    record: int
    image: int

    def read(self) -> tuple[str, Image]:
        """Returns a name of the image, and the image."""
        record = self.source[self.record]
        image = record.images[self.image]
        return (image if isinstance(image, str) else record.id), image


def read_initial(config: ConfigDict, mesh: Mesh) -> Initial:
    """Loads the weights that a run starts from.

    The vision tower is left out where patch features are read and nothing is validated, since no
    program of the run reads it.
    """
    return _load(config, mesh, leave_out=unused_trees(config))


def unused_trees(config: ConfigDict) -> tuple[str, ...]:
    """Returns the names of the frozen top-level trees that no program of a run reads."""
    return ("vision",) if config.data.features and not config.validation.path else ()


def check_kind(config: ConfigDict, variant: Variant) -> None:
    """Raises a ValueError if the config names patch features for a model that cannot read them.

    That is the first stage of BLIP-2.
    """
    if config.data.features and variant.llm is None:
        raise ValueError(
            f"config.data.features is {config.data.features!r}: the first stage of BLIP-2 reads "
            'pixels; leave it empty, ""'
        )


def open_features(config: ConfigDict) -> PatchFeatures | None:
    """Opens the patch features that a run reads; None if it reads pixels. Reads no weights.

    Raises:
        ValueError: they are of another tower or preparation of images, or damaged; or the model is
            a first stage of BLIP-2.
        FileNotFoundError: there are none.
    """
    if not config.data.features:
        return None
    source, variant = _base(config)
    shape = (variant.vision.tokens, variant.vision.width)
    try:
        return PatchFeatures(config.data.features, _facts(config, source, variant), shape)
    except (ValueError, OSError) as error:
        raise type(error)(f"config.data.features: {error}") from error


def write_features(config: ConfigDict, *, batch_size: int, shard_size: int) -> Path:
    """Writes the patch features of all images of a run; returns their folder.

    The folder is `config.data.features`.
    Finished shards of an interrupted export are kept. An image that cannot be used is recorded as
    such: training replaces its record, as it does where it reads pixels.

    Args:
      config: the config of the run; of the fields only those of model, data, mesh and chat are
        read.
      batch_size: images that are computed at once, on all devices together.
      shard_size: images per shard.

    Raises:
      ValueError: a field or a size is wrong, or the folder has features of something else, or
        another process writes to it.
      OSError: the folder cannot be written.
    """
    check_config(config)
    check_batch_size(batch_size)
    check({"shard_size": shard_size}, {"shard_size": whole(1)})
    if not config.data.features:
        raise ValueError("config.data.features is not set: the folder that is written")
    if jax.process_count() > 1:
        raise ValueError("features are written by one process: start it on one host alone")
    out = Path(config.data.features)
    if problem := unwritable(out):
        raise OSError(f"config.data.features is {out}: {problem}; choose another one")
    source, variant = _base(config)
    digests, places = _distinct(setup.read_mixture(config))
    index = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
    facts = _facts(config, source, variant) | {
        "images": hashlib.sha256(index.tobytes()).hexdigest(),
        "count": len(places),
        "shard_size": shard_size,
        "format": SUFFIX,
    }
    with begin(out, facts, _HINT):
        _write_index(out / INDEX, index)
        names = [out / name for name in shard_names(len(places), shard_size, SUFFIX)]
        shards = [places[first : first + shard_size] for first in range(0, len(places), shard_size)]
        both = zip(names, shards, strict=True)
        if left := {path: shard for path, shard in both if not is_whole(path)}:
            _write_shards(config, source, variant, left, batch_size, len(places))
    return out


def _write_shards(
    config: ConfigDict,
    source: Source,
    variant: Variant,
    left: Mapping[Path, Sequence[_Place]],
    batch_size: int,
    count: int,
) -> None:
    """Writes the shards that are left of an export of `count` images."""
    mesh, prepare = setup.read_mesh(config), _preparation(config, source, variant)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    size = -(-min(batch_size, count) // parts) * parts
    encode = _encoder(config, variant, mesh)
    done = count - sum(map(len, left.values()))
    with (
        concurrent.futures.ThreadPoolExecutor(config.data.threads) as threads,
        Progress(count, "features", "images", done=done, compiles=True) as progress,
    ):
        for path, shard in left.items():
            batches = [shard[first : first + size] for first in range(0, len(shard), size)]
            rows = []
            for batch in batches:
                read = list(threads.map(lambda place: _read(place, prepare), batch))
                pixels = np.zeros((size, *read[0].pixels.shape), np.uint8)  # one program for all
                pixels[: len(read)] = [each.pixels for each in read]
                rows.append(_arrays(read, encode(pixels)[: len(read)]))
                progress.update(len(read))
            arrays = {name: np.concatenate([each[name] for each in rows]) for name in rows[0]}
            write_shard(path, arrays, SUFFIX)


class _Read(NamedTuple):
    """An image that was read: its name, its pixels [H, W, 3] uint8, and a problem or ""."""

    name: str
    pixels: np.ndarray
    problem: str


def _read(place: _Place, prepare: ImagePreparation) -> _Read:
    name, image = place.read()
    try:
        return _Read(name, prepare(image, np.random.default_rng(0)), "")
    except ImageError as error:
        return _Read(name, np.zeros((prepare.size, prepare.size, 3), np.uint8), str(error))


def _arrays(read: Sequence[_Read], bits: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the arrays of a part of a shard; `bits` [n, P, D] uint16 are bfloat16 numbers."""
    return {
        "id": np.array([each.name for each in read]),
        "image": bits,
        "problem": np.array([each.problem for each in read]),
    }


def _preparation(config: ConfigDict, source: Source, variant: Variant) -> ImagePreparation:
    """Returns how the run's images become pixels."""
    crop = setup.read_input_format(config, source.input_format).image_crop
    return ImagePreparation(variant.vision.image_size, False, crop, 0.0, False, config.data.exif)


def _encoder(config: ConfigDict, variant: Variant, mesh: Mesh) -> Callable[[np.ndarray], Any]:
    """Returns a function of pixels [B, H, W, 3] that gives the bits [B, P, D] of their features."""
    bridge = dict(init="", trainable=(variant.bridge.key,), leave_out=("llm",))
    params = {"params": _load(config, mesh, **bridge).frozen["vision"]}
    dtype, scan = jnp.dtype(config.model.dtype), setup.read_scans(config, mesh).vision
    tower, rows = VisionTransformer(variant.vision, dtype, scan), batch_sharding(mesh)

    @jax.jit
    def encode(params: Any, pixels: jax.Array) -> jax.Array:
        patches = cast(jax.Array, tower.apply(params, pixels))
        return jax.lax.bitcast_convert_type(patches.astype(jnp.bfloat16), jnp.uint16)

    def run(pixels: np.ndarray) -> np.ndarray:
        with jax.set_mesh(mesh):
            return np.asarray(encode(params, jax.device_put(pixels, rows)))

    return run


def _load(config: ConfigDict, mesh: Mesh, **changes: Any) -> Initial:
    """Loads the weights of a run, with `changes` of the arguments of `load_initial`."""
    frozen_dtype, form = setup.read_frozen_dtype(config)
    settings = dict(
        init=config.model.init,
        trainable=tuple(config.model.trainable),
        fields=setup.read_variant_fields(config),
        dtype=jnp.dtype(config.model.dtype),
        frozen_dtype=frozen_dtype,
        quantise=form,
        mesh=mesh,
    )
    return load_initial(config.model.checkpoint, **(settings | changes))


def _base(config: ConfigDict) -> tuple[Source, Variant]:
    """Returns the checkpoint that a run starts from, and the variant with the run's changes."""
    source = read_source(config.model.checkpoint)
    base_digest(source)  # raises for what no run can start from
    variant = setup.change_variant(source.variant, config)
    check_kind(config, variant)
    return source, variant


def _facts(config: ConfigDict, source: Source, variant: Variant) -> dict[str, Any]:
    """Returns everything that the features of an image depend on, by the names in `TOWER`."""
    leaves = checkpoint.read_manifest(source.folder).items()
    tower = {path: entry for path, entry in leaves if path.startswith("vision/")}
    return {
        "form": FORM,
        "weights": hashlib.sha256(json.dumps(tower, sort_keys=True).encode()).hexdigest(),
        "vision": dataclasses.asdict(variant.vision),
        "dtype": config.model.dtype,
        "frozen_dtype": config.model.frozen_dtype,
        "image_crop": setup.read_input_format(config, source.input_format).image_crop,
        "exif": config.data.exif,
    }


def _distinct(mixture: Mixture) -> tuple[list[bytes], list[_Place]]:
    """Returns the digest of each distinct image of the sources, and one place where it stands.

    Files that cannot be read have no digest and are left out: training replaces their records.
    """
    places: dict[bytes, _Place] = {}
    files: set[Any] = set()  # paths and members of tars, each of which is hashed once
    total = sum(len(source.records) for source in mixture.sources)
    with Progress(total, "listing images", "records") as progress:
        for place, image in _images(mixture, progress):
            if isinstance(image, str | FileSlice):
                if image in files:
                    continue
                files.add(image)
            with contextlib.suppress(ImageError):
                places.setdefault(content_digest(image), place)
    if not places:
        raise ValueError("config.data.sources: no record has an image that can be read")
    return list(places), list(places.values())


def _images(mixture: Mixture, progress: Progress) -> Iterator[tuple[_Place, Image]]:
    """Yields all images of all usable records, with their places."""
    for source in mixture.sources:
        for number in range(len(source.records)):
            with contextlib.suppress(ValueError):  # training replaces such a record, too
                for order, image in enumerate(source.records[number].images):
                    yield _Place(source.records, number, order), image
            progress.update()


def _write_index(path: Path, index: np.ndarray) -> None:
    """Writes the digests of the images atomically; an index that is there is the same."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        np.save(file, index, allow_pickle=False)
    temporary.replace(path)
