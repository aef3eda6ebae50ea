r"""LLaVA's second stage (arXiv 2304.08485): projector and language model, on 158,000 conversations.

    jax-instructblip train --config configs/llava_finetune.py \
      --config.model.checkpoint=llava_base --config.model.init=runs/llava_pretrain

`data/llava_instruct/llava_instruct_150k.json` is LLaVA-Instruct-150K, whose images are COCO's.
"""

from ml_collections import ConfigDict

from configs import common, llava


def get_config() -> ConfigDict:
    """Returns the config of the run."""
    config = llava.finetune("llava_finetune", batch_size=32, epochs=3)
    talks = "data/llava_instruct/llava_instruct_150k.json"
    config.data.sources = ConfigDict(
        {"instruct": common.source(talks, images="data/coco/train2017")}
    )
    # The images before or behind the first question, at random, as the conversations were written.
    config.chat.image_order = "drawn"
    return config
