r"""LLaVA 1.5's first stage (arXiv 2310.03744): the projector alone, on 558,000 captions.

    jax-instructblip backbones llava clip-vit-large-patch14-336 llava_base --llm vicuna-7b-v1.5
    jax-instructblip train --config configs/llava_1_5_pretrain.py \
      --config.model.checkpoint=llava_base

`data/llava_lcs/blip_laion_cc_sbu_558k.json` is LLaVA-Pretrain, whose images lie beside it.

Batch, rate, epochs and weight decay are those of the table "Hyperparameters" in the README of
github.com/haotian-liu/LLaVA; the template and all else of its scripts/v1_5/pretrain.sh.
"""

from ml_collections import ConfigDict

from configs import common, llava


def get_config() -> ConfigDict:
    """Returns the config of the run."""
    config = llava.get_config("llava_1_5_pretrain", batch_size=256, learning_rate=1e-3, epochs=1)
    # The crop stays "clip": the script names no image_aspect_ratio, unlike that of stage two.
    pairs = common.source("data/llava_lcs/blip_laion_cc_sbu_558k.json")
    config.data.sources = ConfigDict({"lcs": pairs})
    config.chat.template = "plain"  # --version plain
    config.chat.limit = 768  # released: 2,048, see llava_pretrain.py; here an image is 576
    return config
