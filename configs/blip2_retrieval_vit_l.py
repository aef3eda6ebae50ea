"""BLIP-2 with ViT-L, fine-tuned for retrieval on COCO at 364 pixels (arXiv 2301.12597)."""

from ml_collections import ConfigDict

from configs import blip2_tuning


def get_config() -> ConfigDict:
    """Returns the config of the run."""
    config = blip2_tuning.retrieval("blip2_stage1_vit_l")
    config.optimizer.learning_rate = 5e-6
    config.optimizer.b2 = 0.98
    return config
