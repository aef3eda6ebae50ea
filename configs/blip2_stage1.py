"""BLIP-2's first stage (arXiv 2301.12597): Q-Former and heads on pairs of images and captions.

jax-instructblip backbones stage1 CHECKPOINT stage1_base --bert bert-base-uncased
jax-instructblip train --config configs/blip2_stage1.py --config.model.checkpoint=stage1_base
"""

from ml_collections import ConfigDict

from configs import blip2_pretraining


def get_config() -> ConfigDict:
    """Returns the config of the run, with the paper's numbers."""
    # With ViT-g; 2,320 with ViT-L.
    config = blip2_pretraining.get_config("blip2_stage1", batch_size=1_680, steps=250_000)
    config.model.trainable = ("qformer", "heads")
    config.validation.path = "data/coco_caption"
    config.validation.split = "val"
    config.validation.every = 10_000
    return config
