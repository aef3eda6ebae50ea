"""BLIP-2 with FlanT5-XL, fine-tuned on visual questions at 490 pixels (arXiv 2301.12597)."""

from ml_collections import ConfigDict

from configs import blip2_tuning


def get_config() -> ConfigDict:
    """Returns the config of the run."""
    return blip2_tuning.vqa("instructblip_flan_t5_xl", vision_layer_decay=0.95)
