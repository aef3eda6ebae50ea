"""InstructBLIP with Vicuna-13B, as in the paper (arXiv 2305.06500)."""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    """Returns the config of the run."""
    return paper.get_config(
        "vicuna_13b",
        batch_size=64,
        samples_per_row=4,
        row=(512, 256),
        sample=(1.0, 20.2, 70.3, 18.1),
    )
