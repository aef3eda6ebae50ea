"""BLIP-2 with ViT-g, fine-tuned for retrieval on COCO at 364 pixels (arXiv 2301.12597)."""

from ml_collections import ConfigDict

from configs import blip2_tuning


def get_config() -> ConfigDict:
    """Returns the config of the run."""
    config = blip2_tuning.retrieval("blip2_stage1")
    config.optimizer.vision_layer_decay = 0.95
    return config
