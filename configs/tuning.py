"""InstructBLIP fine-tuned on one dataset: the image encoder stays frozen, images have 224 pixels.

Of these runs the paper (arXiv 2305.06500) tells no more than that, and that they start from
InstructBLIP. Rates and templates are those of instruction tuning; lengths are ours.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(name: str, samples: int, epochs: int, templates: str = "question") -> ConfigDict:
    """Returns the fine-tuning on the prepared dataset `name`; an epoch has `samples` records.

    `config.model.checkpoint` must be given: a converted InstructBLIP.
    """
    config = common.get_config()
    config.workdir = f"runs/tuning/{name}"
    config.model.remat.llm = "dots"
    config.data.sources = ConfigDict({name: common.source(f"data/{name}", templates=templates)})
    config.train.steps = epochs * (samples // config.data.batch_size)
    # 1,000 steps of warm-up, which instruction tuning has, are longer than most of these runs.
    config.optimizer.warmup_steps = min(1_000, config.train.steps // 10)
    config.checkpoints.every = max(1, config.train.steps // 10)
    config.validation.path = f"data/{name}"
    config.validation.split = "val"
    config.validation.every = max(1, config.train.steps // 10)
    return config
