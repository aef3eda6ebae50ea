"""InstructBLIP fine-tuned on A-OKVQA (arXiv 2305.06500)."""

from ml_collections import ConfigDict

from configs import tuning


def get_config() -> ConfigDict:
    """Returns the config of the run."""
    return tuning.get_config("aokvqa", samples=17_056, epochs=10)
