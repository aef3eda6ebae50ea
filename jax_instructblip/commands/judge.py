"""Lets a language model judge a model's answers beside a reference's, as LLaVA-Bench does.

judge --questions FILE --contexts FILE --reference FILE --answers FILE --model gpt-4 --out DIR
      asks the judge, prints relative scores
judge --reviews FILE
      scores of existing reviews; asks nobody

The files are those that LLaVA published. Its rules, the judge's prompts, are
llava/eval/table/rule.json of github.com/haotian-liu/LLaVA (--rules); without them the package's own
are taken, whose scores do not compare with published ones. Answers are JSON lines with question_id
and text. Boxes among the contexts choose the rules of the benchmark on COCO images, otherwise those
of the one in the wild hold. A review without two scores is asked for again, then left out and
counted; with more than 5 % missing there is no score. The same command continues a run that was
interrupted.
"""

import argparse
import sys
from pathlib import Path

from jax_instructblip.commands.flags import (
    add_endpoint,
    check_flags,
    print_requests,
    read_endpoint,
)

NEEDED = ("questions", "contexts", "reference", "answers", "out", "model")


def main(argv: list[str]) -> int:
    """Judges as the flags say; returns 1 if there is no score, else 0."""
    parser = _parser()
    flags = parser.parse_args(argv)
    check_flags(flags, stores=("questions", "contexts", "reference", "answers", "rules", "reviews"))
    given = [name for name, value in vars(flags).items() if value != parser.get_default(name)]
    if flags.reviews:
        if given != ["reviews"]:
            other = next(name for name in given if name != "reviews")
            parser.error(f"--reviews takes no other flag; found --{other}")
        from jax_instructblip.evaluation.judge_scores import (
            ALL,
            describe_scores,
            read_reviews,
            relative_scores,
        )

        scores = relative_scores(read_reviews(flags.reviews))
        print("\n".join(describe_scores(scores)))
        return int(scores[ALL].relative is None)
    if missing := [f"--{name}" for name in NEEDED if name not in given]:
        parser.error(f"expected {', '.join(missing)}; or --reviews alone")
    settings = read_endpoint(flags)
    from jax_instructblip.evaluation.judge import (
        INPUTS,
        OWN,
        Inputs,
        is_scored,
        judge,
        make_cases,
        read_scores,
    )
    from jax_instructblip.evaluation.judge_scores import describe_scores

    named = {name: getattr(flags, name) for name in INPUTS}
    inputs = Inputs(**{name: path for name, path in named.items() if path is not None})
    if flags.rules is None:
        print(f"rules: {OWN}", file=sys.stderr)
    if flags.dry_run:
        print_requests([case.request for case in make_cases(inputs)], settings)
        return 0
    results = judge(inputs, settings, flags.out)
    for line in describe_scores(read_scores(results)):
        print(line)
    print(f"written: {flags.out}")
    return int(not is_scored(results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-instructblip judge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--questions", type=Path, help="JSON lines: question_id, image, text, category")
    add("--contexts", type=Path, help="JSON lines: image, captions (and instances), or caption")
    add("--reference", type=Path, help="answers of the reference, such as GPT-4's")
    add("--answers", type=Path, help="answers of the model")
    add("--rules", type=Path, help="the judge's prompts, such as rule.json (the package's own)")
    add("--out", type=Path, help="folder to make")
    add("--reviews", type=Path, help="a file of reviews, in the published layout")
    add_endpoint(parser, temperature=0.2, required=False)
    return parser
