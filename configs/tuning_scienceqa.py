"""InstructBLIP fine-tuned on ScienceQA's problems with an image (arXiv 2305.06500)."""

from ml_collections import ConfigDict

from configs import tuning


def get_config() -> ConfigDict:
    """Returns the config of the run."""
    config = tuning.get_config("scienceqa", 6_218, epochs=20, templates="choice_with_context")
    config.data.allow_held_out = ("scienceqa",)  # of InstructBLIP's mixture, not of this run
    return config
