r"""Tunes the Q-Former of a converted checkpoint on your own data.

    jax-instructblip convert FOLDER --out checkpoints/mine
    jax-instructblip check train.jsonl --checkpoint checkpoints/mine
    jax-instructblip train --config configs/custom_jsonl.py \
        --config.model.checkpoint=checkpoints/mine \
        --config.data.sources.mine.path=train.jsonl --config.validation.path=validation.jsonl

One line of train.jsonl:

    {"image": "photos/1.jpg", "prompt": "What is on the table?", "answer": "a cup"}
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """Returns the config of the run, which is shorter than InstructBLIP's, on less data."""
    config = common.get_config()
    config.workdir = "runs/custom"
    config.data.sources = ConfigDict({"mine": common.source("train.jsonl")})
    config.data.batch_size = 16
    config.train.steps = 2_000
    config.optimizer.warmup_steps = 100
    config.checkpoints.every = 500
    config.validation.every = 500
    return config
