"""The table `DATASETS` of all known datasets, joined from the modules of `data/readers`."""

from jax_instructblip import lookup
from jax_instructblip.data.readers import (
    captioning,
    choices,
    dialogue,
    memes,
    reading,
    reasoning,
    video_qa,
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


def get_dataset(name: str) -> Dataset:
    """Returns the dataset of that name.

    Raises:
        ValueError: there is no such dataset; the message lists similar names.
    """
    return lookup.find(DATASETS, name, "dataset")


def table(name: str | None = None) -> str:
    """Returns a text for people about one dataset, or about all where `name` is None.

    It says whether InstructBLIP was trained on the dataset (held in) or only scored on it (held
    out), and lists the annotation files of each split, the licence and where to get the files.

    Raises:
      ValueError: there is no dataset of that name.
    """
    lines = []
    for dataset in DATASETS.values() if name is None else [get_dataset(name)]:
        use = "held in" if dataset.held_in else "held out"
        lines.append(f"{dataset.name}: {dataset.family}, {use}")
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
