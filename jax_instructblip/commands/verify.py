"""Asks a released model what was published of it, and compares the answers.

    jax-instructblip verify --checkpoint FOLDER --image confusing-pictures=Confusing-Pictures.jpg

Without --image it says which images are needed and where to get them. The exit code is 0 where all
questions that could be asked were answered as published, and at least one could.
"""

import argparse
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jax_instructblip.commands.flags import check_flags
from jax_instructblip.data.images import decode
from jax_instructblip.evaluation import published
from jax_instructblip.evaluation.published import Entry, Image
from jax_instructblip.inference.loading import DTYPES, read_source
from jax_instructblip.inference.pipeline import load
from jax_instructblip.models.variants import released_name


def main(argv: list[str]) -> int:
    """Prints a line for each question and a summary; 0 if all that were asked match, else 1."""
    flags = _parser().parse_args(argv)
    check_flags(flags)
    images, entries = published.read_facts(flags.facts)
    given = _read_images(flags.image, images)
    source = read_source(flags.checkpoint)
    model = flags.model or released_name(source.variant)
    mine = [entry for entry in entries if entry.model in ("", model)]
    if not mine:
        known = ", ".join(dict.fromkeys(entry.model for entry in entries))
        raise ValueError(
            f"{flags.facts} has nothing about {model or 'a model of these sizes'}; "
            f"it knows {known}: name one of them by --model if the checkpoint is one"
        )
    asked = [entry for entry in mine if entry.image in given]
    for name in {entry.image for entry in asked}:
        if not published.is_published_file(images[name], given[name]):
            print(f"note: {given[name]} is not the file that was published as {name}")
    matching = _ask(flags, asked, given) if asked else 0
    missing = [entry for entry in mine if entry.image not in given]
    for line in _not_run(missing, images):
        print(line)
    print(
        f"{matching} of {len(asked)} asked match, {len(asked) - matching} differ, "
        f"{len(missing)} not run"
    )
    return int(not asked or matching < len(asked))


def _ask(flags: argparse.Namespace, entries: Sequence[Entry], given: Mapping[str, Path]) -> int:
    """The number of entries that match; each is printed as soon as it is known."""
    blip = load(flags.checkpoint, dtype=flags.dtype)
    matching = 0
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        answer, difference = published.compare(blip, entry, given[entry.image])
        matching += difference is None
        verdict = "match" if difference is None else f"differs at {difference.place}"
        note = f"  (published {entry.note})" if entry.note else ""
        print(f"{entry.name:{width}}  {verdict}{note}", flush=True)
        if difference is not None:
            print(f"    expected  {difference.expected}  by {difference.by}, {entry.source}")
            print(f"    found     {difference.found}")
            print(f"    answer    {answer.text!r}")
    return matching


def _not_run(entries: Sequence[Entry], images: Mapping[str, Image]) -> Iterator[str]:
    for name in dict.fromkeys(entry.image for entry in entries):
        yield f"not run without --image {name}=FILE ({images[name].description}):"
        yield f"    from {images[name].url}"
        yield from (f"    {entry.name}" for entry in entries if entry.image == name)


def _read_images(words: Sequence[str], images: Mapping[str, Image]) -> dict[str, Path]:
    """The files of `NAME=FILE`, each opened once: a bad one should not wait for the weights."""
    given = {}
    for word in words:
        name, _, path = word.partition("=")
        if not path:
            raise ValueError(f"--image {word}: expected NAME=FILE, NAME of {', '.join(images)}")
        if name not in images:
            near = difflib.get_close_matches(name, images, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(images)}"
            raise ValueError(f"--image {word}: there is no image {name!r}; {hint}")
        decode(path)
        given[name] = Path(path)
    return given


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-instructblip verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a Hugging Face folder, a converted one, or a run")
    add("--image", nargs="+", action="extend", default=[], metavar="NAME=FILE", help="one or more")
    add("--facts", type=Path, default=published.FACTS, help="a file of other published answers")
    add("--model", help="which of the models in the facts it is (default: by its sizes)")
    add(
        "--dtype",
        choices=DTYPES,
        help="of weights and computing (default: bfloat16, on a CPU float32)",
    )
    return parser
