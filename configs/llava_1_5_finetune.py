r"""LLaVA 1.5's second stage (arXiv 2310.03744): projector and language model, 665,000 dialogues.

    jax-instructblip train --config configs/llava_1_5_finetune.py \
      --config.model.checkpoint=llava_base --config.model.init=runs/llava_1_5_pretrain

`data/llava_mix/llava_v1_5_mix665k.json` names images of COCO, GQA, OCR-VQA, TextVQA and Visual
Genome, each in a folder beside it. Images are padded to a square. The released training also draws
each batch from rows of a similar length (--group_by_modality_length); here it is drawn from all.

Batch, rate, epochs and weight decay are those of the table "Hyperparameters" in the README of
github.com/haotian-liu/LLaVA; template and crop of its scripts/v1_5/finetune.sh.
"""

from ml_collections import ConfigDict

from configs import common, llava


def get_config() -> ConfigDict:
    """Returns the config of the run."""
    config = llava.finetune("llava_1_5_finetune", batch_size=128, epochs=1)
    config.data.sources = ConfigDict(
        {"mix": common.source("data/llava_mix/llava_v1_5_mix665k.json")}
    )
    config.data.crop = "pad"  # --image_aspect_ratio pad
    config.chat.image_order = "first"  # released: the image is moved before the first question
    return config
