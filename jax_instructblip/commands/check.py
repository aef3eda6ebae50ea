"""Reads a file of your own data as training would, and reports every bad line.

Opens every image, counts tokens, and shows a few samples with the loss's target tokens in
[brackets]. The exit code is 1 if any line is bad.
"""

import argparse
import pathlib

from jax_instructblip.commands.flags import check_flags


def main(argv: list[str]) -> int:
    """Prints the report; returns 1 if a line is bad, else 0."""
    parser = argparse.ArgumentParser(prog="jax-instructblip check", description=__doc__)
    parser.add_argument("file", type=pathlib.Path, help="JSON lines: image(s), prompt, answer(s)")
    parser.add_argument(
        "--checkpoint",
        default="shapes_t5",
        help="whose tokenizers count: a folder, a run or an embedded name (default: %(default)s)",
    )
    parser.add_argument("--samples", type=int, default=5, help="how many to show (default: 5)")
    flags = parser.parse_args(argv)
    check_flags(flags, stores=("file", "checkpoint"))
    from jax_instructblip.data.jsonl_check import describe, examine
    from jax_instructblip.inference.text_loading import load_text

    text = load_text(flags.checkpoint)
    findings = examine(flags.file, text, flags.samples)
    for line in describe(flags.file, findings, text):
        print(line)
    print(f"tokens are counted with the tokenizers of {flags.checkpoint} (--checkpoint)")
    return int(not findings.usable)
