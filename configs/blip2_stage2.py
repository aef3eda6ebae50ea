"""BLIP-2's second stage (arXiv 2301.12597) before OPT, or before Vicuna.

    jax-instructblip backbones stage2 runs/blip2_stage1 stage2_base --llm opt-2.7b
    jax-instructblip train --config configs/blip2_stage2.py --config.model.checkpoint=stage2_base

The language model is asked for the whole caption, without a prompt. FlanT5 has a config of its
own. InstructBLIP's authors trained a second stage before Vicuna; its numbers were not published.
"""

from ml_collections import ConfigDict

from configs import blip2_pretraining


def get_config() -> ConfigDict:
    """Returns the config of the run, with the paper's numbers."""
    config = blip2_pretraining.get_config("blip2_stage2", batch_size=1_920, steps=80_000)
    config.optimizer.final_learning_rate = 5e-5
    config.text.answer_limit = 32
    return config
