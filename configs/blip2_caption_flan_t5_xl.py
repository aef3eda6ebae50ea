"""BLIP-2 with FlanT5-XL, fine-tuned on COCO captions at 364 pixels (arXiv 2301.12597)."""

from ml_collections import ConfigDict

from configs import blip2_tuning


def get_config() -> ConfigDict:
    """Returns the config of the run."""
    return blip2_tuning.caption("blip2_flan_t5_xl", vision_layer_decay=1.0)
