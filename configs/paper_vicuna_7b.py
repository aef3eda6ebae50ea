"""InstructBLIP with Vicuna-7B, as in the paper (arXiv 2305.06500)."""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    """Returns the config of the run."""
    return paper.get_config(
        "vicuna_7b",
        batch_size=128,
        samples_per_row=8,
        row=(768, 320),
        sample=(1.0, 20.4, 70.4, 18.1),
    )
