"""InstructBLIP with FlanT5-XL, as in the paper (arXiv 2305.06500)."""

from ml_collections import ConfigDict

from configs import paper


def get_config() -> ConfigDict:
    """Returns the config of the run."""
    return paper.get_config(
        "flan_t5_xl",
        batch_size=192,
        samples_per_row=12,
        row=(896, 384),
        sample=(1.0, 21.3, 53.5, 17.9),
    )
