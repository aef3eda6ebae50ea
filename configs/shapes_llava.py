"""LLaVA's second stage on the drawn world: projector and language model, minutes on two CPU cores.

jax-instructblip train --config configs/shapes_llava.py

It starts from a run of `configs/shapes_llava_pretrain.py`.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """Returns the quickstart's config, changed for conversations and a trained language model."""
    config = quickstart.get_config()
    config.workdir = "runs/llava"
    config.model.checkpoint = "runs/llava_base"
    config.model.init = "runs/llava_pretrain"
    config.model.trainable = ("projector", "llm")
    config.model.qformer_dropout = -1.0  # there is no Q-Former

    config.chat.template = "v1"
    config.chat.system = ""  # the usual one would be two thirds of a sample
    config.chat.limit = 64

    config.train.steps = 800
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.0
    config.checkpoints.every = 200
    config.validation.every = 400
    return config
