"""InstructBLIP with Vicuna-7B, as in the paper (arXiv 2305.06500)."""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    """The fields of the run."""
    return paper.get_config("vicuna_7b", batch_size=128)
