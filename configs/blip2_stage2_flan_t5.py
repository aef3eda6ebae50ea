"""BLIP-2's second stage (arXiv 2301.12597) before FlanT5: it reads a caption's beginning.

    jax-instructblip backbones stage2 runs/blip2_stage1 stage2_base --llm flan-t5-xl

and `train` with this file and `--config.model.checkpoint=stage2_base`.

The encoder reads the image and the first words, up to a word before the middle that each step
draws; the decoder is asked for the rest (prefix language modelling).
"""

from ml_collections import ConfigDict

from configs import blip2_stage2


def get_config() -> ConfigDict:
    """Returns the config of the run: that before OPT, with some fields changed."""
    config = blip2_stage2.get_config()
    config.workdir = "runs/blip2_stage2_flan_t5"
    config.data.batch_size = 1_520
    config.text.prompt_limit = 32
    for source in config.data.sources.values():
        source.templates = "caption_prefix"
    return config
