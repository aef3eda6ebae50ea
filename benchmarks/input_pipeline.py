"""The suite `input`: from records on disk to batches, ours and torch with Hugging Face.

    python -m benchmarks.run --suite input --photos DIR [--tokenizers DIR] [--rounds 5]

DIR has JPEGs; TOKENIZERS has `t5/` and `bert-base-uncased/` (default: the small ones in the
package). Both sides get the same images, prompts and answers:

    ours, evaluation   ArrayRecord -> decode, squash (bit-equal to theirs), tokens, uint8 batch
    ours, training     ArrayRecord -> decode, random crop and mirror, tokens, targets, uint8 batch
    theirs             JPEG file -> DataLoader, InstructBlipProcessor (Pillow) -> float32 batch

Each measurement runs in its own process, without and with one worker process. Compared is the
processor time per sample, summed over all processes, so that other programs have little influence;
its inverse is the number of images per second and core. The sides alternate for several rounds, and
medians are reported. All files are open before the time is taken. Also measured for ours: growth of
memory over many samples, and the time to the first batch of a million records.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.workload import facts

SIDES = ("theirs", "ours_evaluation", "ours_training")
RECORDS = 2_048  # in the dataset `photos`
BATCH = 32
WARM_UP = 12  # batches before the time is taken
STEPS = 1_000_000  # so many that no measurement reaches the end of the data
PROMPT = "Use the provided image to answer the question: {question} Short answer:"
QUESTIONS = (
    "what is the color of the largest object?",
    "how many people are there?",
    "where is it?",
)
ANSWERS = ("a red bus", "three", "on the left of the table, next to a cup")


def texts(index: int) -> tuple[str, str]:
    """Returns prompt and answer of sample `index`."""
    return PROMPT.format(question=QUESTIONS[index % 3]), ANSWERS[index // 3 % 3]


def prepare(work: pathlib.Path, photos: list[pathlib.Path], count: int) -> None:
    """Writes `count` records, cycling through the photos, to the ArrayRecord dataset in `work`."""
    from jax_instructblip.data.prepare import builder
    from jax_instructblip.data.records import Record

    def records() -> Iterator[Record]:
        for index in range(count):
            prompt, answer = texts(index)
            image = str(photos[index % len(photos)])
            yield Record(f"record{index}", (image,), prompt, (answer,))

    builder.prepare(work, "photos", {"train": records})


def text_processor(flags: argparse.Namespace) -> Any:
    """Returns the text processor with the tokenizers of `flags.tokenizers` or embedded ones."""
    from jax_instructblip.checkpoint import read_config
    from jax_instructblip.data.text import TextProcessor
    from jax_instructblip.data.tokenizer_files import load_tokenizers
    from jax_instructblip.inference.loading import resolve_checkpoint
    from jax_instructblip.models.released import get_variant
    from jax_instructblip.models.variants import Variant

    if flags.tokenizers is None:
        folder = resolve_checkpoint("shapes_t5")
        variant = Variant.from_dict(read_config(folder)["variant"])
        variant = variant.replace(**{"vision.image_size": 224})
        return TextProcessor.load(folder, variant)
    folders = flags.tokenizers / "t5", flags.tokenizers / "bert-base-uncased"
    return TextProcessor(get_variant("instructblip-flan-t5-xl"), *load_tokenizers(*folders, "t5"))


def ours(flags: argparse.Namespace, augment: bool) -> Iterator[Any]:
    """Yields this package's batches on the device, as a training run reads them."""
    from jax_instructblip.data import loader
    from jax_instructblip.data.mixture import Mixture, Source
    from jax_instructblip.data.prepare import builder
    from jax_instructblip.data.train_batches import TrainBatches
    from jax_instructblip.parallel.mesh import batch_sharding, make_mesh

    records: Any = builder.source(flags.work, flags.dataset, "train")
    mixture = Mixture([Source("photos", records, "digest")], seed=0)
    text, buckets = text_processor(flags), (32,)
    batches = TrainBatches(
        mixture,
        text,
        batch_size=BATCH,
        steps=STEPS,
        buckets=buckets,
        augment=augment,
        min_decode_ratio=flags.min_decode_ratio,
    )
    sharding = batch_sharding(make_mesh())
    return loader.load(batches, sharding, threads=1, ahead=2, workers=flags.workers)


def theirs(flags: argparse.Namespace) -> Iterator[Any]:
    """Yields batches of a torch DataLoader with transformers' InstructBlipProcessor."""
    import torch
    import transformers
    from PIL import Image
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    torch.set_num_threads(1)
    text = text_processor(flags)
    size = {"height": 224, "width": 224}
    processor: Any = transformers.InstructBlipProcessor(
        BlipImageProcessorPil(size=size), text.llm, text.qformer, num_query_tokens=32
    )
    photos = list_photos(flags.photos)

    class Photos(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return STEPS * BATCH

        def __getitem__(self, index: int) -> tuple[Any, str, str]:
            image = Image.open(photos[index % len(photos)]).convert("RGB")
            return image, *texts(index)

    def collate(samples: list[tuple[Any, str, str]]) -> Any:
        images, prompts, answers = map(list, zip(*samples, strict=True))
        batch = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        batch["labels"] = text.llm(answers, padding=True, return_tensors="pt").input_ids
        return dict(batch)

    loader = torch.utils.data.DataLoader(
        Photos(), BATCH, collate_fn=collate, num_workers=flags.workers
    )
    return iter(loader)


def list_photos(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the JPEGs in the folder, sorted; exits if there are none."""
    photos = sorted(each for each in folder.iterdir() if each.suffix.lower() in (".jpg", ".jpeg"))
    if not photos:
        raise SystemExit(f"{folder} has no JPEG (*.jpg, *.jpeg)")
    return photos


def batches_of(flags: argparse.Namespace, side: str) -> Iterator[Any]:
    """Returns an endless iterator of the batches of `side`, one of `SIDES`."""
    return theirs(flags) if side == "theirs" else ours(flags, side == "ours_training")


def speed(flags: argparse.Namespace) -> dict[str, float]:
    """Returns processor and wall milliseconds per sample, after a warm-up."""
    made = batches_of(flags, flags.side)
    skip(made, WARM_UP)
    used, began = processor_seconds(), time.monotonic()
    skip(made, flags.batches)
    used, took = processor_seconds() - used, time.monotonic() - began
    samples = flags.batches * BATCH
    return {"processor_ms": 1e3 * used / samples, "wall_ms": 1e3 * took / samples}


def memory(flags: argparse.Namespace) -> dict[str, float]:
    """Returns megabytes of all processes after a tenth of the samples and after all, and growth."""
    made = batches_of(flags, flags.side)
    tenth = -(-flags.samples // (10 * BATCH))
    found = []
    for _ in range(10):
        skip(made, tenth)
        found.append(resident_megabytes())
    return {"samples": 10 * tenth * BATCH, "first_mb": found[0], "last_mb": found[-1]} | {
        "growth": found[-1] / found[0] - 1
    }


def cold_start(flags: argparse.Namespace) -> dict[str, float]:
    """Returns seconds: of setting the pipeline up (with imports), then to the first batch."""
    began = time.monotonic()
    made = batches_of(flags, flags.side)  # imports what it needs
    imported = time.monotonic()
    skip(made, 1)
    return {"open_s": imported - began, "first_batch_s": time.monotonic() - imported}


def skip(made: Iterator[Any], count: int) -> None:
    """Takes `count` batches from `made`; exits if there are fewer."""
    if sum(1 for _ in itertools.islice(made, count)) < count:
        raise SystemExit("the pipeline ended early")


def processes() -> list[pathlib.Path]:
    """Returns the /proc folders of this process and all its descendants."""
    found = [pathlib.Path("/proc/self")]
    for each in found:
        for thread in (each / "task").iterdir():
            found += [
                pathlib.Path("/proc", word) for word in (thread / "children").read_text().split()
            ]
    return found


def processor_seconds() -> float:
    """Returns the processor seconds of this process and its descendants."""
    fields = [(each / "stat").read_text().rpartition(")")[2].split() for each in processes()]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


def resident_megabytes() -> float:
    """Returns the megabytes of this process and its descendants; shared pages count once (PSS)."""
    lines = [line for each in processes() for line in (each / "smaps_rollup").open()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


MEASURES = {"speed": speed, "memory": memory, "cold_start": cold_start}


def repeated(work: pathlib.Path, copies: int) -> None:
    """Makes the dataset `million` in `work`: `copies` times the shards of `photos`, hard-linked."""
    source = next((work / "jax_instructblip_records" / "photos").iterdir())
    target = work / "jax_instructblip_records" / "million" / source.name
    target.mkdir(parents=True)
    for file in source.glob("*.json"):
        (target / file.name).write_text(file.read_text().replace('"photos"', '"million"'))
    info = json.loads((target / "dataset_info.json").read_text())
    (split,) = info["splits"]
    split["shardLengths"] = split["shardLengths"] * copies
    (target / "dataset_info.json").write_text(json.dumps(info))
    shards = sorted(source.glob("*array_record*")) * copies
    stem = shards[0].name.partition("array_record")[0]
    for number, shard in enumerate(shards):
        name = f"{stem}array_record-{number:05}-of-{len(shards):05}"
        os.link(shard, target / name)


def child(flags: argparse.Namespace, measure: str, **fields: Any) -> dict[str, float]:
    """Calls a function of `MEASURES` in a new process; returns its result.

    `fields` replace values of `flags`.
    """
    words = [sys.executable, "-m", "benchmarks.input_pipeline", "--measure", measure]
    given = {**vars(flags), "side": None, "workers": None, **fields}
    for name in (
        "photos",
        "tokenizers",
        "work",
        "dataset",
        "side",
        "workers",
        "batches",
        "samples",
        "min_decode_ratio",
    ):
        if given[name] is not None:
            words += [f"--{name}", str(given[name])]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns each side's median time per sample and its speed relative to `theirs`.

    They are given for 0 and for 1 worker process, over `flags.rounds` rounds.
    """
    rows = {}
    for workers in (0, 1):
        rounds = [
            {side: child(flags, "speed", side=side, workers=workers) for side in SIDES}
            for _ in range(flags.rounds)
        ]
        found = {
            side: {
                name: round(statistics.median(each[side][name] for each in rounds), 3)
                for name in ("processor_ms", "wall_ms")
            }
            for side in SIDES
        }
        for side in SIDES:
            ratios = [
                each["theirs"]["processor_ms"] / each[side]["processor_ms"] for each in rounds
            ]
            found[side]["images_per_core_second"] = round(1e3 / found[side]["processor_ms"], 1)
            found[side]["times_theirs"] = round(statistics.median(ratios), 3)
            print(f"workers {workers}, {side}: {found[side]}", flush=True)
        rows[f"workers_{workers}"] = found
    return rows


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the suite `input`."""
    group = parser.add_argument_group("the suite input")
    add = group.add_argument
    add("--photos", type=pathlib.Path, help="folder of JPEGs; required")
    add("--tokenizers", type=pathlib.Path, help="folder with t5/ and bert-base-uncased/")
    add("--rounds", type=int, default=5, help="of alternation (%(default)s)")
    add("--batches", type=int, default=30, help="measured in each round (%(default)s)")
    add("--samples", type=int, default=20_000, help="read to see memory grow (%(default)s)")
    add("--min_decode_ratio", type=float, default=0.6, help="as in configs/common.py; 0: exact")


def run(flags: argparse.Namespace) -> None:
    """Takes all measurements, prints them and writes them to `flags.out`."""
    if flags.photos is None:
        raise SystemExit("--suite input needs --photos, a folder of JPEGs")
    flags.dataset = "photos"
    with tempfile.TemporaryDirectory() as work:
        flags.work = work
        prepare(pathlib.Path(work), list_photos(flags.photos), RECORDS)
        repeated(pathlib.Path(work), -(-1_000_000 // RECORDS))
        figures: dict[str, Any] = {"speed": compare(flags)}
        for side in SIDES[1:]:
            figures[f"memory_{side}"] = child(flags, "memory", side=side)
        figures["cold_start_million"] = child(
            flags, "cold_start", side="ours_training", dataset="million"
        )
    for name, values in figures.items():
        if name != "speed":
            print(f"{name}: {values}")
    head = facts("run", sys.argv[1:])
    flags.out.write_text(json.dumps(head | figures, indent=1) + "\n")


def main() -> None:
    """Takes the one measurement that `child` asks for, and prints it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_flags(parser)
    for name in ("--work", "--side", "--measure", "--dataset"):
        parser.add_argument(name)
    parser.add_argument("--workers", type=int, default=0)
    flags = parser.parse_args()
    print(json.dumps(MEASURES[flags.measure](flags)))


if __name__ == "__main__":
    main()
