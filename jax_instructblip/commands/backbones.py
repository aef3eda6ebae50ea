"""Makes initial checkpoints for the stages of training, and the embedded ones.

`stage1` combines a vision tower with an untrained Q-Former, `stage2` a trained Q-Former with a
language model; `instruct` makes a second stage's Q-Former read the instruction. `llava` combines a
vision tower with a language model, a random projector between them.
`launch/backbones.sh` also calls `towers` before them, and `embed` after them.
"""

import argparse
from pathlib import Path

from jax_instructblip.backbones.sizes import LANGUAGE
from jax_instructblip.commands.flags import check_flags

STORES = {  # the flags of each part that may be addresses of a store
    "stage1": ("base", "out", "bert"),
    "stage2": ("stage1", "out", "llm"),
    "instruct": ("stage2", "out", "text_from"),
    "llava": ("vision", "out", "llm"),
}


def main(argv: list[str]) -> int:
    """Runs the part that the first argument names; returns 0."""
    parser = argparse.ArgumentParser(prog="jax-instructblip backbones", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    towers = parts.add_parser("towers", help="train vision tower and language models: WORK/base_*")
    towers.add_argument("work", type=Path, help="folder for what is made; finished parts are kept")
    towers.add_argument("--kinds", nargs="+", choices=tuple(LANGUAGE), default=list(LANGUAGE))
    towers.add_argument("--seed", type=int, default=0)
    towers.add_argument(
        "--scale", type=float, default=1.0, help="of all step counts (default: %(default)s)"
    )
    towers.add_argument(
        "--embedded", action="store_true", help="copy those of the embedded checkpoints; train none"
    )
    embed = parts.add_parser("embed", help="SOURCE in bfloat16, as an embedded checkpoint: OUT")
    embed.add_argument("source", type=Path, help="the folder that `instruct` made")
    embed.add_argument("out", type=Path, help="a checkpoint folder there is replaced")
    stage1 = parts.add_parser("stage1", help="vision tower of BASE, fresh Q-Former and heads: OUT")
    stage1.add_argument("base", type=Path, help="any checkpoint")
    stage1.add_argument("out", type=Path, help="folder to make; must not exist")
    stage1.add_argument("--bert", type=Path, help="a Hugging Face folder of BERT to start from")
    stage1.add_argument(
        "--word_std",
        type=float,
        help="standard deviation of random word embeddings (default: BERT's, 0.02)",
    )
    stage1.add_argument("--seed", type=int, default=0)
    stage2 = parts.add_parser("stage2", help="Q-Former of STAGE1 before a language model: OUT")
    stage2.add_argument("stage1", type=Path, help="checkpoint or run of the first stage")
    stage2.add_argument("out", type=Path, help="folder to make; must not exist")
    stage2.add_argument(
        "--llm",
        type=Path,
        required=True,
        help="a Hugging Face folder of FlanT5, OPT, LLaMA or Vicuna, or a checkpoint with one",
    )
    stage2.add_argument("--seed", type=int, default=0, help="of the projection (default: 0)")
    instruct = parts.add_parser("instruct", help="STAGE2 with a Q-Former that reads text: OUT")
    instruct.add_argument("stage2", type=Path, help="checkpoint or run of the second stage")
    instruct.add_argument("out", type=Path, help="folder to make; must not exist")
    instruct.add_argument(
        "--text_from",
        type=Path,
        required=True,
        help="the first stage whose text half of the Q-Former is taken",
    )
    llava = parts.add_parser("llava", help="vision tower VISION before a language model: OUT")
    llava.add_argument("vision", type=Path, help="a Hugging Face folder of CLIP, or any checkpoint")
    llava.add_argument("out", type=Path, help="folder to make; must not exist")
    llava.add_argument(
        "--llm",
        type=Path,
        required=True,
        help="a Hugging Face folder of LLaMA, Vicuna, Llama 3, Mistral or Qwen, or a checkpoint "
        "with one",
    )
    llava.add_argument(
        "--layers", type=int, default=2, help="of the projector: 1 (v1) or 2 (v1.5, default)"
    )
    llava.add_argument("--seed", type=int, default=0, help="of the projector (default: 0)")
    flags = parser.parse_args(argv)
    check_flags(flags, stores=STORES.get(flags.part, ()))
    if flags.part == "stage2":
        from jax_instructblip.backbones.stage2 import write_stage2

        write_stage2(flags.stage1, flags.out, llm=flags.llm, seed=flags.seed)
    elif flags.part == "llava":
        from jax_instructblip.backbones.llava import write_llava

        settings = {"layers": flags.layers, "seed": flags.seed}
        write_llava(flags.vision, flags.out, llm=flags.llm, **settings)
    elif flags.part == "instruct":
        from jax_instructblip.backbones.stage2 import write_instruct

        write_instruct(flags.stage2, flags.out, text_from=flags.text_from)
    elif flags.part == "stage1":
        from jax_instructblip.backbones.stage1 import write_stage1

        more = {"word_std": flags.word_std, "seed": flags.seed}
        write_stage1(flags.base, flags.out, bert=flags.bert, **more)
    elif flags.part == "embed":
        from jax_instructblip.backbones.build import replace_embedded

        replace_embedded(flags.source, flags.out)
    else:
        from jax_instructblip.backbones.towers import copy_towers, train_towers

        make = copy_towers if flags.embedded else train_towers
        make(flags.work, flags.kinds, seed=flags.seed, scale=flags.scale)
    return 0
