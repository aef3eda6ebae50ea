r"""LLaVA fine-tuned on ScienceQA (arXiv 2304.08485): projector and language model, 12 epochs.

    jax-instructblip train --config configs/llava_scienceqa.py \
      --config.model.checkpoint=llava_base --config.model.init=runs/llava_pretrain

`data/scienceqa/llava_train_QCM-LEA.json` has the problems as conversations: question, context and
options, answered by lecture, explanation and "The answer is B.".
"""

from ml_collections import ConfigDict

from configs import common, llava


def get_config() -> ConfigDict:
    """Returns the config of the run."""
    config = llava.finetune("llava_scienceqa", batch_size=128, epochs=12)
    talks = "data/scienceqa/llava_train_QCM-LEA.json"
    images = "data/scienceqa/images/train"
    config.data.sources = ConfigDict({"scienceqa": common.source(talks, images=images)})
    return config
