r"""LLaVA's first stage (arXiv 2304.08485): the projector alone, on 595,000 pairs of CC3M.

    jax-instructblip backbones llava clip-vit-large-patch14 llava_base --llm vicuna-7b --layers 1
    jax-instructblip train --config configs/llava_pretrain.py --config.model.checkpoint=llava_base

`data/llava_cc3m/chat.json` is LLaVA-CC3M-Pretrain-595K, whose images are in `images/`. CC3M's own
pairs, downloaded into tars, do as well, with the filter that made the 595,000 of them:

    --config.data.sources.cc3m.path=downloads/cc3m --config.data.sources.cc3m.images= \
    --config.data.sources.cc3m.noun_phrases=100 --config.data.sources.cc3m.templates=brief

The template `plain` writes an image and its caption. The paper's first release had `v0`, and a
question of the list `brief` before each caption; in chat.json the questions are drawn already.
"""

from ml_collections import ConfigDict

from configs import common, llava


def get_config() -> ConfigDict:
    """Returns the config of the run."""
    config = llava.get_config("llava_pretrain", batch_size=128, learning_rate=2e-3, epochs=1)
    pairs = common.source("data/llava_cc3m/chat.json", images="data/llava_cc3m/images")
    config.data.sources = ConfigDict({"cc3m": pairs})
    config.chat.template = "plain"
    # An image is 256 of them, a caption of CC3M below 100. The released script has 2,048, to which
    # no row is padded; `plan` and the memory that is kept for a row count all of the limit.
    config.chat.limit = 512
    return config
