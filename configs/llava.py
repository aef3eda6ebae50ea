"""Fields that LLaVA's trainings share (arXiv 2304.08485 and 2310.03744): AdamW, schedule, lengths.

No weight decay, a warm-up of 3 % of all steps from 0, a cosine to 0, gradients clipped to a norm of
1: the released scripts say so, the last by the default of their trainer. Adam's numbers are those
of `common.py`.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(name: str, batch_size: int, learning_rate: float, epochs: float) -> ConfigDict:
    """Returns what the trainings share: the projector is trained, the folder is `runs/NAME`.

    `batch_size` counts all devices together; `learning_rate` is the peak.
    `config.model.checkpoint` must be given: `jax-instructblip backbones llava` makes it.
    """
    config = common.get_config()
    config.workdir = f"runs/{name}"
    config.model.trainable = ("projector",)
    config.model.remat.llm = "full"  # released: gradient checkpointing
    config.data.batch_size = batch_size
    config.data.augment = False
    config.data.crop = "clip"
    config.data.exif = False  # released: images are not turned upright
    config.data.sampling = "proportional"  # every sample is equally likely
    config.data.buckets = (64, 128, 256, 512, 1_024)  # few lengths, so few programs
    config.chat.template = "v1"  # "v0" with Vicuna v0, before which the paper's numbers were made
    config.train.epochs = epochs
    config.optimizer.learning_rate = learning_rate
    config.optimizer.warmup_learning_rate = 0.0
    config.optimizer.warmup_ratio = 0.03
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0
    config.checkpoints.keep = 1  # with the language model one takes 12 bytes a parameter
    return config


def finetune(name: str, batch_size: int, epochs: float) -> ConfigDict:
    """Returns a training of all weights of projector and language model; arguments as above."""
    config = get_config(name, batch_size, 2e-5, epochs)
    config.model.trainable = ("projector", "llm")
    config.mesh.data = 1  # released: weights and moments are split over all devices
    config.mesh.fsdp = -1
    return config
