"""Pixels and accuracy with `config.data.min_decode_ratio` = 0.6, compared with whole decoding.

python -m benchmarks.crop_decoding --photos DIR [--seeds 0 1] [--steps 300] [--out FILE]

Pixels: the same random crops of each JPEG below DIR, decoded whole and at reduced size; the mean
and largest difference of their 8-bit values, and the processor time of each way.

Accuracy: pictures of `shapes`, each with a written word, as JPEGs that are as large relative to the
model's input as a COCO photograph is to 224 x 224. The quickstart's model is trained on random
crops of them, for each seed and way of decoding, and tested on new pictures. Finished runs in WORK
are reused; `--seeds` without numbers skips this part.
"""

import argparse
import datetime
import io
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from typing import Any

import numpy as np
import PIL
from PIL import Image

from benchmarks import quickstart
from jax_instructblip.data import images
from jax_instructblip.data.shapes import dataset, tasks

MIN_RATIO = 0.6  # the value of min_decode_ratio that is measured
SIZE = 224
PARTS = 50  # random crops per photograph
BATCH = 32
SIDE = 160  # side of the JPEGs of shapes, in pixels


def pixel_difference(photos: list[pathlib.Path]) -> dict[str, Any]:
    """Returns mean and largest pixel difference (0 to 255), per photograph and overall."""
    rows = {}
    seconds = {0.0: 0.0, MIN_RATIO: 0.0}
    for photo in photos:
        content = photo.read_bytes()
        means, largest = [], 0
        for seed in range(PARTS):
            crops = []
            for min_ratio in seconds:
                start = time.process_time()
                rng = np.random.default_rng(seed)
                crops.append(
                    images.random_resized_crop_flip(content, SIZE, rng, min_ratio=min_ratio)
                )
                seconds[min_ratio] += time.process_time() - start
            difference = np.abs(crops[0].astype(int) - crops[1])
            means.append(float(difference.mean()))
            largest = max(largest, int(difference.max()))
        rows[photo.name] = {
            "mean": round(statistics.mean(means), 3),
            "mean_of_the_worst_part": round(max(means), 3),
            "largest": largest,
        }
    whole, reduced = (round(1e3 * each / PARTS / len(photos), 3) for each in seconds.values())
    return {
        "photographs": len(rows),
        "parts": PARTS,
        "processor_ms": {"whole": whole, "reduced": reduced},
        "mean": round(statistics.mean(row["mean"] for row in rows.values()), 3),
        "mean_of_the_worst_part": max(row["mean_of_the_worst_part"] for row in rows.values()),
        "largest": max(row["largest"] for row in rows.values()),
        "each": rows,
    }


def write_pictures(folder: pathlib.Path) -> pathlib.Path:
    """Writes the training scenes of `shapes` as enlarged JPEGs; returns their JSON-lines file."""
    path = folder / "train.jsonl"
    if path.is_file():
        return path
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    stream, count, families = dataset.DATASETS["shapes"]["train"]
    lines = []
    for index in range(count):
        name = f"pictures/{index:06d}.jpg"
        records = tasks.scene_records(dataset.SEED, stream, index, families)
        drawn = records[0].images[0]
        assert isinstance(drawn, bytes)
        with Image.open(io.BytesIO(drawn)) as picture:
            large = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        large.save(folder / name, "JPEG", quality=95)
        for record in records:
            row = {"id": record.id, "image": name, "prompt": record.prompt, "task": record.task}
            lines.append(json.dumps(row | {"answers": list(record.answers)}))
    path.write_text("\n".join(lines) + "\n")
    return path


def accuracy(work: pathlib.Path, seeds: list[int], steps: int, limit: int) -> dict[str, Any]:
    """Returns exact match in percent for each way of decoding, as lists over `seeds`.

    They are given for the mean of all families of questions, and for each family. Decoding is
    "whole" or "reduced". `work` is the folder of the runs, which train for `steps`; `limit` is the
    number of test questions.
    """
    data = write_pictures(work / "data")
    rows: dict[str, Any] = {}
    for name, min_ratio in (("whole", 0.0), ("reduced", MIN_RATIO)):
        fields = {
            "data.sources.shapes.path": data,
            "data.augment": True,
            "data.min_decode_ratio": min_ratio,
            "data.batch_size": BATCH,
            "train.steps": steps,
            "validation.every": steps,
            "validation.first": False,
            "validation.limit": 64,
        }
        reports = [
            quickstart.run(work / f"{name}_{seed}", "llama", True, seed, limit, fields)
            for seed in seeds
        ]
        splits = [each["datasets"]["test"] for each in reports]
        rows[name] = {
            "mean_of_families": [round(split["value"], 2) for split in splits],
            "families": {
                family: [round(split["values"][f"accuracy/{family}"], 2) for split in splits]
                for family in splits[0]["families"]
            },
        }
    return {"steps": steps, "batch_size": BATCH, "seeds": seeds, "questions": limit, **rows}


def main() -> None:
    """Runs both comparisons, prints the results and writes them as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--photos", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/crop_decoding"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--limit", type=int, default=400, help="questions")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file")
    flags = parser.parse_args()
    figures: dict[str, Any] = {
        "command": "python -m benchmarks.crop_decoding " + " ".join(sys.argv[1:]),
        "date": str(datetime.date.today()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"pillow": PIL.__version__},
        "min_decode_ratio": MIN_RATIO,
        "pixels": pixel_difference(sorted(flags.photos.rglob("*.jpg"))),
    }
    print({name: value for name, value in figures["pixels"].items() if name != "each"}, flush=True)
    if flags.seeds:
        figures["accuracy"] = accuracy(flags.work.absolute(), flags.seeds, flags.steps, flags.limit)
        print(figures["accuracy"])
    if flags.out:
        flags.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
