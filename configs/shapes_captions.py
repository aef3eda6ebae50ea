"""The caption phase of the embedded Q-Former: frozen towers, queries alone (BLIP-2's stage 2).

`launch/backbones.sh` runs it on folders that `jax-instructblip backbones towers` has made.
"""

from ml_collections import ConfigDict

from configs import common, quickstart


def get_config() -> ConfigDict:
    """The quickstart's fields, for captions and without instruction."""
    config = quickstart.get_config()
    config.workdir = "runs/backbones/captions"
    config.model.checkpoint = "runs/backbones/base_llama"
    config.model.instruction_aware = False

    config.data.sources = ConfigDict({"captions": common.source("shapes-captions")})
    config.text.answer_limit = 40  # five things and a word

    config.train.steps = 2_500
    config.optimizer.learning_rate = 1.5e-3  # the queries start from nothing
    config.checkpoints.every = 500
    config.validation.path = "shapes-captions"
    config.validation.every = 500
    config.validation.max_new_tokens = 40
    return config
