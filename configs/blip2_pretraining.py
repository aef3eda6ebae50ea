"""Fields that the first two stages of BLIP-2 (arXiv 2301.12597) share: data, AdamW, warm-up.

The paper has 129 million images of the six datasets in `PAIRS`. The captions of web images were
written and filtered by BLIP (CapFilt): ten of them and the original one are ranked with CLIP, the
best two are kept, and each step draws one. If the caption in an entry's .json is a list, each step
draws one of it, too; the lists that were released have one caption per image.
"""

from ml_collections import ConfigDict

from configs import common

# A source is what `jax-instructblip prepare NAME --raw ... --out data` writes, or a folder of tars:
# `--config.data.sources.laion.path=downloads/laion`. An empty path leaves a source out; LAVIS
# trains on the first two alone.
PAIRS = (
    "coco_caption",  # 566,747 captions of Karpathy's train split
    "visual_genome",  # 821,774 captions of regions
    "cc3m",
    "cc12m",
    "sbu",
    "laion",  # 115 million of LAION-400M
)


def get_config(name: str, batch_size: int, steps: int) -> ConfigDict:
    """Returns the config of one stage, whose folder is `runs/NAME`.

    `batch_size` counts the samples of all devices together.
    """
    config = common.get_config()
    config.workdir = f"runs/{name}"
    config.data.sources = ConfigDict(
        {pairs: common.source(f"data/{pairs}", templates="bare_caption") for pairs in PAIRS}
    )
    config.data.batch_size = batch_size
    config.data.sampling = "proportional"  # every pair is equally likely
    config.train.steps = steps
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_learning_rate = 1e-6  # as in LAVIS; the paper does not say
    config.optimizer.warmup_steps = 2_000
    config.optimizer.b2 = 0.98
    return config
