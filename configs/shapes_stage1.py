"""BLIP-2's first stage on the drawn world: minutes on two CPU cores.

jax-instructblip backbones stage1 shapes_t5 runs/stage1_base
jax-instructblip train --config configs/shapes_stage1.py
"""

from ml_collections import ConfigDict

from configs import common, quickstart


def get_config() -> ConfigDict:
    """Returns the quickstart's config, changed for pairs of images and captions."""
    config = quickstart.get_config()
    config.workdir = "runs/stage1"
    config.model.checkpoint = "runs/stage1_base"
    config.model.llm_dropout = -1.0  # there is no language model
    config.model.trainable = ("qformer", "heads")
    captions = common.source("shapes-captions", templates="bare_caption")
    config.data.sources = ConfigDict({"captions": captions})
    config.text.caption_limit = 40  # five things and a word
    config.train.steps = 800
    config.optimizer.learning_rate = 1.5e-3  # the Q-Former starts from nothing
    config.checkpoints.every = 400
    config.validation.path = "shapes-captions"
    config.validation.every = 200
    config.validation.limit = 200
    return config
