"""Features of many images on disk, in shards, so that an interrupted export is resumed.

    OUT/features.json              what the features are of: weights, list of images, form, dtype
    OUT/00000-of-00012.npz         one shard: arrays with a row per image, or
    OUT/00000-of-00012.arrayrecord a record per image: the bytes of an `.npz` with its arrays,
                                   without the axis n and without `text_of`

    id             [n] names: the path in the folder, or the id of the JSON line
    image          [n, Q, E] float32; [n, Q, D] if raw; of a generative model [n, F * Q, Dl], the
                   visual vectors of F images that the bridge gives its language model
    text           [m, E] float32 of each caption, [m, D] if raw (first stage, lines with answers)
    text_of        [m] row of the image that the caption belongs to
    caption        [m] the captions
    prompt         [n] the prompts (generative model)

A shard appears completely or not at all.
"""

import contextlib
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_instructblip.atomic import sole_writer, unwritable, write_file
from jax_instructblip.data.images import ImageError
from jax_instructblip.data.patch_features import FACTS, differences, shard_names
from jax_instructblip.data.readers.named_files import PICTURES
from jax_instructblip.data.records import Record, RecordError, read_jsonl
from jax_instructblip.fields import check, one_of, whole
from jax_instructblip.files import read_json, require_file
from jax_instructblip.inference.batching import check_batch_size
from jax_instructblip.inference.digests import weights_digest
from jax_instructblip.inference.feature_forms import FORMATS, FORMS, SHARD
from jax_instructblip.inference.generation_config import BATCH_SIZE
from jax_instructblip.inference.loading import read_dtype, read_source
from jax_instructblip.inference.pipeline import InstructBlipPipeline, load
from jax_instructblip.inference.retrieval import Retriever
from jax_instructblip.progress import Progress

Arrays = dict[str, np.ndarray]

_HINT = "images is a digest of names, texts, and the sizes and times of files"


def write_features(
    checkpoint: str | os.PathLike,
    images: str | os.PathLike,
    out: str | os.PathLike,
    *,
    form: str | None = None,
    prompt: str | None = None,
    dtype: Any = None,
    batch_size: int = BATCH_SIZE,
    shard_size: int = SHARD,
    file_format: str = "npz",
) -> Path:
    """Writes the features of all images to shards in `out`; finished shards are kept.

    Args:
      checkpoint: a first stage of BLIP-2, or a model that answers; any folder or name for `load`.
      images: a folder of images, searched with its subfolders, or a JSON-lines file of records.
      out: the folder of the shards; one of an interrupted export is resumed.
      form: "raw", "projected" or "normalised" (default), as `retrieval.py` explains; for a first
        stage alone.
      prompt: the prompt for all images of a folder, by default ""; for a model that answers alone.
      dtype: the dtype of weights and computation; by default bfloat16, on a CPU float32.
      batch_size: images that are computed at once.
      shard_size: images per shard.
      file_format: "npz" or "arrayrecord".

    Returns:
      The folder `out`.

    Raises:
      ValueError: a setting does not fit the checkpoint, there are no images, one of them cannot be
        used (`ImageError`), or `out` has features of another checkpoint, list or setting.
      OSError: a file cannot be read or written, or `out` has other files than features.
    """
    out, images = Path(out), Path(images)
    check(
        {"format": file_format, "shard_size": shard_size},
        {"format": one_of(*FORMATS), "shard_size": whole(1)},
    )
    check_batch_size(batch_size)
    if problem := unwritable(out):
        raise OSError(f"{out} cannot be written to: {problem}; choose another folder")
    source = read_source(checkpoint)
    first_stage = source.variant.llm is None
    _check_settings(images, first_stage, form, prompt)
    records = _read_records(images, prompt or "", first_stage)
    blip = None
    facts = {
        "weights": weights_digest(source),
        "images": list_digest(records, images if images.is_dir() else images.parent),
        "count": len(records),
        "form": (form or FORMS[-1]) if first_stage else "visual vectors",
        "dtype": read_dtype(dtype).name,
        "shard_size": shard_size,
        "format": file_format,
    }
    if (crop := source.input_format.image_crop) != "squash":
        facts["image_crop"] = crop
    with begin(out, facts, _HINT):
        names = [out / name for name in shard_names(len(records), shard_size, file_format)]
        left = [number for number, path in enumerate(names) if not is_whole(path)]
        shard = lambda number: records[number * shard_size : (number + 1) * shard_size]
        done = len(records) - sum(len(shard(number)) for number in left)
        with Progress(len(records), "features", "images", done=done, compiles=True) as progress:
            for number in left:
                if blip is None:  # if everything is there, no weights are read
                    blip = load(checkpoint, dtype=dtype)
                    blip.silent = True
                arrays = _arrays(blip, shard(number), facts["form"], batch_size)
                write_shard(names[number], arrays, file_format)
                progress.update(len(shard(number)))
    return out


def read_shard(path: str | os.PathLike) -> Arrays:
    """Returns the arrays of an `.npz` shard, or of one ArrayRecord record as an `io.BytesIO`."""
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _check_settings(images: Path, first_stage: bool, form: str | None, prompt: str | None) -> None:
    problems = []
    if form is not None and not first_stage:
        problems.append("form: only a first stage of BLIP-2 has several forms")
    if form not in (None, *FORMS):
        problems.append(f"form is {form!r}, expected one of {', '.join(FORMS)}")
    if prompt is not None and first_stage:
        problems.append("prompt: a first stage of BLIP-2 reads none")
    elif prompt is not None and not images.is_dir():
        problems.append("prompt: JSON lines have prompts of their own")
    if problems:
        raise ValueError("; ".join(problems))


def _read_records(images: Path, prompt: str, first_stage: bool) -> list[Record]:
    if not images.is_dir():
        require_file(images)
        records = read_jsonl(images, need_answers=False, need_prompt=False)
    else:
        paths = [path for path in images.rglob("*") if _is_picture(path)]
        records = [
            Record(path.relative_to(images).as_posix(), (str(path),), prompt, ())
            for path in sorted(paths)
        ]
        if not records:
            raise ValueError(
                f"{images} has no images: expected files that end in {', '.join(sorted(PICTURES))}"
            )
    problems = [
        f"{record.id}: {problem}" for record in records for problem in record.text_problems()
    ]
    if problems:
        raise RecordError(f"{images}: texts cannot be used:", problems)
    most = 1 if first_stage else len(records[0].images)
    wrong = [record.id for record in records if len(record.images) != most]
    if wrong:
        raise ValueError(
            f"{images}: {len(wrong)} records do not have {most} image{'s' * (most > 1)}, such as "
            f"{wrong[0]!r}: export records with different numbers of images separately"
        )
    return records


def _is_picture(path: Path) -> bool:
    """Tells whether a path is of an image, by its name; not the `._NAME` that macOS adds."""
    named = path.suffix.lower() in PICTURES and not path.name.startswith("._")
    return named and not path.is_dir()  # a link to nothing is an error, not left out


def is_whole(path: Path) -> bool:
    """Tells whether a shard is there, and complete: a power cut may have shortened an `.npz`."""
    return path.is_file() and (path.suffix != ".npz" or zipfile.is_zipfile(path))


def list_digest(records: Sequence[Record], folder: Path) -> str:
    """Returns a sha256 of ids, texts, and the names, sizes and times of the image files.

    Names of files below `folder` are relative to it, so that it may be moved.
    """
    digest = hashlib.sha256()
    for record in records:
        paths = [Path(image) for image in record.images if isinstance(image, str)]
        below = [each.relative_to(folder) if folder in each.parents else each for each in paths]
        files = [os.stat(each) for each in paths]
        stands = [
            (str(name), each.st_size, each.st_mtime_ns)
            for name, each in zip(below, files, strict=True)
        ]
        digest.update(repr((record.id, record.prompt, record.answers, stands)).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def begin(out: Path, facts: dict[str, Any], hint: str) -> Iterator[None]:
    """Writes `facts` to `features.json`, or compares them with those of an interrupted export.

    While the block runs, no other process may write features to the folder. `hint` tells in an
    error what the digest `facts["images"]` stands for.

    Raises:
        ValueError: an earlier export there has other facts, or another process writes to it.
        FileExistsError: the folder has other files than features.
    """
    with sole_writer(out):
        path = out / FACTS
        if path.is_file():
            if wrong := differences(read_json(path, dict), facts):
                title = f"{out} has features of something else:"
                raise ValueError("\n  ".join([title, *wrong, f"choose another folder ({hint})"]))
        elif out.is_dir() and any(each.name != f"{FACTS}.tmp" for each in out.iterdir()):
            raise FileExistsError(f"{out} exists and has no {FACTS}: choose another folder")
        write_file(path, json.dumps(facts, indent=1) + "\n")
        for left in out.glob("*.tmp"):
            left.unlink()
        yield


def _arrays(
    blip: Retriever | InstructBlipPipeline, records: Sequence[Record], form: str, size: int
) -> Arrays:
    """Returns the arrays of one shard."""
    names = np.array([record.id for record in records])
    try:
        if not isinstance(blip, Retriever):
            prompts = [record.prompt for record in records]
            vectors = blip.features([record.images for record in records], prompts, size)
            return {"id": names, "prompt": np.array(prompts), "image": vectors}
        images = [record.images[0] for record in records]
        arrays = {"id": names, "image": blip.image_features(images, form=form, batch_size=size)}
    except ImageError as error:
        raise ValueError(
            f"{error}; finished shards stay: mend or remove the image (then choose another out)"
        ) from error
    captions = [caption for record in records for caption in record.answers]
    if captions:
        owners = [row for row, record in enumerate(records) for _ in record.answers]
        arrays["text"] = blip.text_features(captions, form=form, batch_size=size)
        arrays |= {"text_of": np.array(owners, np.int32), "caption": np.array(captions)}
    return arrays


def write_shard(path: Path, arrays: Arrays, file_format: str) -> None:
    """Writes a shard under a temporary name, then renames it; `file_format` is one of `FORMATS`."""
    temporary = path.with_name(f"{path.name}.tmp")
    if file_format == "npz":
        temporary.write_bytes(_packed(arrays))
    else:
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        for row in range(len(arrays["id"])):
            writer.write(_packed(_row(arrays, row)))
        writer.close()
    temporary.replace(path)


def _row(arrays: Arrays, row: int) -> Arrays:
    """Returns the arrays of one image, with its captions; `problem` stands in place of `image`."""
    names = ("id", "prompt", "image", "problem")
    own = {name: arrays[name][row] for name in names if name in arrays}
    if own.get("problem"):
        del own["image"]
    elif "problem" in own:
        del own["problem"]
    if "text" in arrays:
        chosen = arrays["text_of"] == row
        own |= {name: arrays[name][chosen] for name in ("text", "caption")}
    return own


def _packed(arrays: Arrays) -> bytes:
    data = io.BytesIO()
    np.savez(data, **arrays)  # pyright: ignore[reportArgumentType]
    return data.getvalue()
