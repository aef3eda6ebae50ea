"""BLIP-2's first stage (arXiv 2301.12597): Q-Former and heads on pairs of images and captions.

    jax-instructblip backbones stage1 CHECKPOINT stage1_base --bert bert-base-uncased
    jax-instructblip train --config configs/blip2_stage1.py --config.model.checkpoint=stage1_base

The paper's 129 million pairs are of COCO, Visual Genome, CC3M, CC12M, SBU and LAION; any prepared
dataset of captions, or JSON lines, is a source.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The fields that differ from instruction tuning, each with the paper's number."""
    config = common.get_config()
    config.workdir = "runs/blip2_stage1"
    config.model.trainable = ("qformer", "heads")
    config.data.sources = ConfigDict({"coco_caption": common.source("data/coco_caption")})
    config.data.batch_size = 1_680  # with ViT-g; 2,320 with ViT-L
    config.data.sampling = "proportional"  # pairs of all sources are one set
    config.train.steps = 250_000
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_learning_rate = 1e-6
    config.optimizer.warmup_steps = 2_000
    config.optimizer.b2 = 0.98
    config.validation.path = "data/coco_caption"
    config.validation.split = "val"
    config.validation.every = 10_000
    return config
