"""InstructBLIP with FlanT5-XXL, as in the paper (arXiv 2305.06500)."""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    """The fields of the run."""
    return paper.get_config("flan_t5_xxl", batch_size=64)
