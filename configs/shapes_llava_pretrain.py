"""LLaVA's first stage on the drawn world: the projector alone, a minute or two on two CPU cores.

jax-instructblip backbones llava shapes_llama runs/llava_base --llm shapes_llama
jax-instructblip train --config configs/shapes_llava_pretrain.py
"""

from ml_collections import ConfigDict

from configs import common, quickstart


def get_config() -> ConfigDict:
    """Returns the quickstart's config, changed for a projector and captions."""
    config = quickstart.get_config()
    config.workdir = "runs/llava_pretrain"
    config.model.checkpoint = "runs/llava_base"
    config.model.trainable = ("projector",)
    config.model.qformer_dropout = -1.0  # there is no Q-Former

    config.data.sources = ConfigDict({"captions": common.source("shapes-captions")})
    config.text.answer_limit = 40  # five things and a word

    config.train.steps = 400
    config.optimizer.learning_rate = 4e-3  # one matrix that starts from nothing
    config.optimizer.warmup_steps = 30
    config.optimizer.weight_decay = 0.0
    config.checkpoints.every = 200
    config.validation.path = "shapes-captions"
    config.validation.every = 400
    config.validation.limit = 200
    config.validation.max_new_tokens = 40
    return config
