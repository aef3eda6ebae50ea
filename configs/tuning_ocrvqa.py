"""InstructBLIP fine-tuned on OCR-VQA (arXiv 2305.06500)."""

from ml_collections import ConfigDict

from configs import tuning


def get_config() -> ConfigDict:
    """Returns the config of the run."""
    return tuning.get_config("ocrvqa", samples=800_000, epochs=2)  # about so many
