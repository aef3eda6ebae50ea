"""BLIP-2's second stage on the drawn world: captions of a frozen language model.

jax-instructblip backbones stage2 runs/stage1 runs/stage2_base --llm shapes_t5
jax-instructblip train --config configs/shapes_captions.py
"""

from ml_collections import ConfigDict

from configs import common, quickstart


def get_config() -> ConfigDict:
    """Returns the quickstart's config, changed for captions and without instruction."""
    config = quickstart.get_config()
    config.workdir = "runs/stage2"
    config.model.checkpoint = "runs/stage2_base"
    config.model.instruction_aware = False

    config.data.sources = ConfigDict({"captions": common.source("shapes-captions")})
    config.text.answer_limit = 40  # five things and a word

    config.train.steps = 1_000
    config.optimizer.learning_rate = 5e-4  # at a higher one the Q-Former forgets how to read texts
    config.checkpoints.every = 500
    config.validation.path = "shapes-captions"
    config.validation.every = 250
    config.validation.max_new_tokens = 40
    return config
