"""InstructBLIP with FlanT5-XXL, as in the paper (arXiv 2305.06500)."""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    """Returns the config of the run."""
    return paper.get_config(
        "flan_t5_xxl",
        batch_size=64,
        samples_per_row=4,
        row=(384, 256),
        sample=(1.0, 21.2, 53.4, 17.7),
    )
