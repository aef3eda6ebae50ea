"""Tunes the embedded Q-Former on the drawn world `shapes`: minutes on two CPU cores.

The frozen towers are LLaMA-like; `--config.model.checkpoint=shapes_t5` takes the T5-like ones.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """Returns the config of the run."""
    config = common.get_config()
    config.workdir = "runs/quickstart"
    config.model.checkpoint = "shapes_llama"
    config.model.qformer_dropout = 0.0
    config.model.llm_dropout = 0.0
    config.model.dtype = "float32"  # what CPUs compute fastest
    config.model.frozen_dtype = "float32"

    config.data.sources = ConfigDict({"shapes": common.source("shapes")})
    config.data.batch_size = 64
    config.data.buckets = ()  # one padded length: one program to compile
    config.data.augment = False  # a mirrored image would have other answers
    config.data.threads = 1
    config.text.qformer_limit = 34  # the longest question has as many
    config.text.prompt_limit = 28
    config.text.answer_limit = 12

    config.train.steps = 1_500
    config.optimizer.learning_rate = 8e-4
    config.optimizer.warmup_steps = 100
    config.optimizer.clip_norm = 1.0
    config.checkpoints.every = 250

    config.validation.path = "shapes"
    config.validation.every = 250
    config.validation.limit = 400
    config.validation.max_new_tokens = 12
    return config
