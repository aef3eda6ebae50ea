"""The tables of all known datasets, joined from the modules of `data/readers`.

`DATASETS` are those of InstructBLIP, `PRETRAINING` those that BLIP-2 is trained on before it,
`TUNING` those that its fine-tunings add, `EVALUATION` the benchmarks of LLaVA beside them.
"""

from jax_instructblip import lookup
from jax_instructblip.data.readers import (
    captioning,
    choices,
    dialogue,
    llava_bench,
    memes,
    pope,
    pretraining,
    reading,
    reasoning,
    scienceqa,
    video_qa,
    visual_genome,
    vqa,
)
from jax_instructblip.data.readers.dataset import FAMILIES, Dataset

_MODULES = (captioning, reasoning, vqa, choices, reading, video_qa, dialogue, memes)

# Sorted by family, in the order of FAMILIES; within a family in the order of the modules.
DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in sorted(
        (dataset for module in _MODULES for dataset in module.DATASETS),
        key=lambda dataset: FAMILIES.index(dataset.family),
    )
}
# Trained on in BLIP-2's first two stages, beside the captions of COCO.
PRETRAINING: dict[str, Dataset] = {dataset.name: dataset for dataset in pretraining.DATASETS}
# Trained on in BLIP-2's fine-tuning on questions, beside VQAv2.
TUNING: dict[str, Dataset] = {dataset.name: dataset for dataset in visual_genome.DATASETS}
# The benchmarks that LLaVA is measured on; InstructBLIP's own `scienceqa` is in `DATASETS`.
EVALUATION: dict[str, Dataset] = {
    dataset.name: dataset
    for module in (scienceqa, pope, llava_bench)
    for dataset in module.DATASETS
}

ALL = DATASETS | PRETRAINING | TUNING | EVALUATION


def get_dataset(name: str) -> Dataset:
    """Returns the dataset of that name.

    Raises:
        ValueError: there is no such dataset; the message lists similar names.
    """
    return lookup.find(ALL, name, "dataset")


def table(name: str | None = None) -> str:
    """Returns a text for people about one dataset, or about all where `name` is None.

    It says how the dataset is used (held in: InstructBLIP was trained on it; held out: only scored
    on it; pre-training: BLIP-2, from which it starts, was trained on it; fine-tuning: a fine-tuned
    BLIP-2 was), and lists the annotation files of each split, the licence and where to get them.

    Raises:
      ValueError: there is no dataset of that name.
    """
    lines = []
    for dataset in ALL.values() if name is None else [get_dataset(name)]:
        lines.append(f"{dataset.name}: {dataset.family}, {dataset.use}")
        for split, names in dataset.files.items():
            count = f"{dataset.counts[split]:,} records" if split in dataset.counts else ""
            again = " and ".join(dataset.rerelease.get(split, ()))
            needs = " and ".join(names) + (f", or {again}" if again else "")
            lines.append(f"  {split:12} {count:18} {needs}")
        lines.append(f"  licence: {dataset.licence}")
        lines.append(f"  from: {dataset.source}")
        if dataset.notes:
            lines.append(f"  note: {dataset.notes}")
    return "\n".join(lines)
