"""Reads a file of your own data as training would, and reports every bad line.

Opens every image, counts tokens, and shows a few samples with the loss's target tokens in
[brackets]. With --template, and for a model with a chat template, every line is a conversation; the
file may then be a JSON list in LLaVA's layout. For a first stage of BLIP-2 the answers of a line
are captions of its image. The exit code is 1 if any line is bad.
"""

import argparse
import dataclasses
import pathlib

from jax_instructblip.commands.flags import add_template, check_flags


def main(argv: list[str]) -> int:
    """Prints the report; returns 1 if a line is bad, else 0."""
    parser = argparse.ArgumentParser(prog="jax-instructblip check", description=__doc__)
    parser.add_argument(
        "file", type=pathlib.Path, help="JSON lines: image(s), prompt, answer(s); or conversations"
    )
    parser.add_argument(
        "--checkpoint",
        default="shapes_t5",
        help="whose tokenizers count: a folder, a run or an embedded name (default: %(default)s)",
    )
    parser.add_argument("--samples", type=int, default=5, help="how many to show (default: 5)")
    add_template(parser)
    parser.add_argument(
        "--limit",
        type=int,
        default=argparse.SUPPRESS,
        help="of a conversation: most tokens and visual vectors (default: the model's, or 2048); "
        "of a first stage's caption: most tokens (default: 32)",
    )
    parser.add_argument(
        "--images", type=pathlib.Path, help="folder of the images that a JSON list names"
    )
    flags = parser.parse_args(argv)
    check_flags(flags, stores=("file", "checkpoint"))
    from jax_instructblip.data.captions import CaptionTokenizer
    from jax_instructblip.data.chat_text import ChatTextProcessor
    from jax_instructblip.data.jsonl_check import describe, examine
    from jax_instructblip.inference.text_loading import load_training_text

    text = load_training_text(flags.checkpoint, flags.template)
    chat = None
    if isinstance(text, CaptionTokenizer) and "limit" in flags:
        text = dataclasses.replace(text, limit=flags.limit)
    if isinstance(text, ChatTextProcessor):
        chat = text.with_limit(flags.limit).chat if "limit" in flags else text.chat
    findings = examine(flags.file, text, flags.samples, chat, flags.images)
    for line in describe(flags.file, findings):
        print(line)
    print(f"tokens are counted with the tokenizers of {flags.checkpoint} (--checkpoint)")
    return int(not findings.usable)
