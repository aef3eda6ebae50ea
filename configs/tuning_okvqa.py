"""InstructBLIP fine-tuned on OKVQA (arXiv 2305.06500)."""

from ml_collections import ConfigDict

from configs import tuning


def get_config() -> ConfigDict:
    """Returns the config of the run."""
    return tuning.get_config("okvqa", samples=9_009, epochs=10)
