"""The datasets of InstructBLIP and of BLIP-2's pre-training, from the modules of `data/readers`."""

from jax_instructblip import lookup
from jax_instructblip.data.readers import (
    captioning,
    choices,
    dialogue,
    memes,
    pretraining,
    reading,
    reasoning,
    video_qa,
    vqa,
)
from jax_instructblip.data.readers.dataset import FAMILIES, Dataset

_MODULES = (captioning, reasoning, vqa, choices, reading, video_qa, dialogue, memes)

# In the order of the families, then as the modules have them.
DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in sorted(
        (dataset for module in _MODULES for dataset in module.DATASETS),
        key=lambda dataset: FAMILIES.index(dataset.family),
    )
}
# What BLIP-2's first two stages are trained on besides COCO's captions.
PRETRAINING: dict[str, Dataset] = {dataset.name: dataset for dataset in pretraining.DATASETS}

ALL = DATASETS | PRETRAINING


def get_dataset(name: str) -> Dataset:
    """The dataset of that name; a ValueError with those spelled alike where there is none."""
    return lookup.find(ALL, name, "dataset")


def table(name: str | None = None) -> str:
    """All datasets for people, or one: its use, what files it needs, where they come from.

    Raises:
      ValueError: there is none of that name.
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
