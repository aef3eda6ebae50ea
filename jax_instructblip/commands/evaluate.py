"""Evaluates a model on benchmarks, next to the paper's numbers, or by task family on `shapes`.

evaluate --checkpoint DIR --datasets gqa,vsr --data DIR --out DIR   benchmarks, by their protocols
evaluate --datasets gqa --predictions FILE --data DIR --out DIR     scores of existing answers
evaluate --checkpoint A --beside B C --datasets gqa --data DIR --out DIR   several, in one table
evaluate --compare A B                                              samples that differ
evaluate --list                                                     datasets, prompts, settings
evaluate --checkpoint RUN                                           exact match by task family
evaluate --checkpoint A --beside B C --data shapes --out DIR        the same, of several models

`--datasets held_out` is all 13 of the paper's table 1; a first stage of BLIP-2 is measured on
coco_retrieval and flickr30k_retrieval. DIR of --data is what `jax-instructblip prepare` wrote, or
the original files. An interrupted evaluation is resumed; finished datasets are not answered again.
Several processes share the questions.
"""

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax_instructblip.commands.flags import add_quantise, add_template, check_flags
from jax_instructblip.evaluation.by_kind import NAMES as DATASETS
from jax_instructblip.evaluation.by_kind import full_table
from jax_instructblip.evaluation.settings import DECODING, MODES, NAMES, PLACES, SHOWING
from jax_instructblip.inference.generation_config import add_flags
from jax_instructblip.models.variants import DTYPES
from jax_instructblip.parallel import membership


def main(argv: list[str]) -> int:
    """Evaluates as the flags say; returns 1 if a dataset could not be scored, else 0."""
    parser = _parser()
    args = parser.parse_args(argv)
    check_flags(args, stores=(*PLACES, "beside", "compare"))
    for kind in ("list", "compare"):
        if getattr(args, kind):
            _refuse_others(parser, args, kind)
    if args.list:
        print(full_table())
        return 0
    if args.compare:
        from jax_instructblip.evaluation.compare import describe

        print("\n".join(describe(*args.compare)))
        return 0
    cluster, *limits = membership.read_flags(args)
    if cluster is not None and not args.datasets:
        raise ValueError(
            "several processes share the questions of --datasets alone: name datasets, or start "
            "one process (without --coordinator)"
        )
    from jax_instructblip import evaluate
    from jax_instructblip.parallel.cluster import joined

    results = evaluate(
        **{name: getattr(args, name) for name in NAMES},
        joined=joined(cluster, *limits),
        command=shlex.join(["jax-instructblip", "evaluate", *argv]),
    )
    return int(any(map(_failed, _entries(results.get("datasets", {})))))


def _entries(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the entries of all datasets, however deep: with --beside each has several."""
    for each in results.values():
        if "unscored" in each:
            yield each
        else:
            yield from _entries(each)


def _failed(result: dict[str, Any]) -> bool:
    """Returns True if a dataset should have a score and has none; a judge's comes later."""
    return bool(result["unscored"]) and not result["judged"]


def _refuse_others(parser: argparse.ArgumentParser, args: argparse.Namespace, kind: str) -> None:
    """Raises a ValueError if other flags are combined with `--list` or `--compare`."""
    changed = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    if wrong := sorted(set(changed) - {kind}):
        names = ", ".join(f"--{name}" for name in wrong)
        raise ValueError(f"{names}: not used with --{kind}, which takes no other flag")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-instructblip evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", help="a Hugging Face folder, a converted one, a run, or an embedded name")
    add("--beside", nargs="+", default=(), metavar="CHECKPOINT", help="others to compare with")
    add("--list", action="store_true", help="print datasets, prompts, settings; then end")
    add("--datasets", help=f"with commas: held_out, {', '.join(DATASETS)}")
    add("--data", help="see above; of families a JSON-lines file or `shapes` (default: the run's)")
    add("--split", help="other than the paper's (of families one or more; default: test splits)")
    add("--limit", type=int, default=0, help="questions of each, always the same (default: all)")
    add("--out", type=Path, help="folder to write to (of families by default the run)")
    add(
        "--batch_size",
        type=int,
        help="at once, of datasets on each device (8; 128 pairs)",
    )
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two --out, or predictions")
    add("--predictions", type=Path, help="JSON lines with id, and text or scores; or a VQA tool's")
    add(
        "--relevance", type=Path, metavar="FILE", help="dense annotations, for visual_dialog's NDCG"
    )
    add("--no_baselines", action="store_true", help="of families: without `blind` and `before`")
    group = parser.add_argument_group("instead of what the protocols of the datasets say")
    add = group.add_argument
    add("--prompt", help="placeholders: {question} {options} {context} {ocr} {history} {answer}")
    add("--mode", choices=MODES, help="rank candidates, or generate")
    add("--candidates", type=Path, metavar="FILE", help="one a line, of msvd_qa and msrvtt_qa")
    add_flags(group, *DECODING, unset=True)
    add("--length_normalise", action="store_true", default=None, help="of a ranking: mean, not sum")
    add("--k", type=int, help="of a retrieval: the nearest that are re-ranked (128)")
    add("--itm_only", action="store_true", default=None, help="of a retrieval: without similarity")
    group = parser.add_argument_group("how records are shown, where paper and released code differ")
    add = group.add_argument
    add(
        "--text_processor",
        choices=SHOWING["text_processor"],
        help="(paper) lavis: questions in lower case",
    )
    add("--dialogue", choices=SHOWING["dialogue"], help="(plain) q_a: `q: ... a: ...`")
    add(
        "--image_crop",
        choices=SHOWING["image_crop"],
        help="(the model's own) center, clip: the middle; pad: all; squash: all, distorted",
    )
    add("--ignore_exif", action="store_true", help="photographs are not turned upright")
    add_template(group)
    group = parser.add_argument_group("where the model lies")
    add = group.add_argument
    add("--dtype", choices=DTYPES, help="(bfloat16, on a CPU float32)")
    add_quantise(group)
    add("--fsdp", type=int, default=1, help="devices that weights are split over (1)")
    add("--tensor", type=int, default=1, help="devices that share every question (1)")
    membership.add_flags(parser)
    return parser
