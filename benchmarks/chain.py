"""Compares tuning after BLIP-2's two stages with tuning from a random Q-Former.

WORK=DIR OUT=MADE TOWERS=embedded bash launch/backbones.sh
python -m benchmarks.chain --work DIR --made MADE [--kinds llama t5] [--seeds 0] [--out FILE]
python -m benchmarks.chain --draw [--out FILE]    the curves in FILE alone

All is on the drawn world. Reads the curves of both stages in DIR. Tunes on instructions
(`configs/quickstart.py`) from MADE/shapes_KIND, the result of the stages, and from DIR/base_KIND,
which has the same frozen towers and a random Q-Former. Finished runs are reused; others take five
to ten minutes each. Prints a table, and writes a JSON file, its curves as a PNG beside it, and
DIR/chain.html.
"""

import argparse
import json
import os
import pathlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from benchmarks import quickstart
from jax_instructblip.evaluation.reports import curves, page
from jax_instructblip.training.metrics import read_metrics

LEVEL = 0.8  # validation accuracy
EVERY = 100  # steps between validations, to see when the level is reached
STARTS = {"both stages": "shapes", "random Q-Former": "base"}  # first part of the name
PREFIX = "validation/"

Curve = Sequence[Mapping[str, float]]  # lines with "step" and scores by name, in order


def validations(folder: pathlib.Path) -> list[dict[str, float]]:
    """Returns a dict for each validation of a run: its `step`, and scores such as `score`.

    Raises:
        FileNotFoundError: there is no such run, or it was never validated.
    """
    found = [
        {"step": line["step"]}
        | {name.removeprefix(PREFIX): line[name] for name in line if name.startswith(PREFIX)}
        for line in read_metrics(folder)
        if f"{PREFIX}score" in line
    ]
    if not found:
        raise FileNotFoundError(
            f"{folder} has no validation: expected a run of launch/backbones.sh, called with "
            f"WORK={folder.parent}"
        )
    return found


def steps_to(level: float, curve: Curve) -> int | None:
    """Returns the step of the first validation with at least this score; None if there is none."""
    return next((int(line["step"]) for line in curve if line["score"] >= level), None)


def tune(
    work: pathlib.Path,
    made: pathlib.Path,
    kinds: Iterable[str],
    seeds: Iterable[int],
    limit: int,
) -> list[dict[str, Any]]:
    """Tunes from each start; returns a row per language model, seed and start.

    `work` and `made` are the folders DIR and MADE, `kinds` are some of `quickstart.KINDS`, `limit`
    is the number of test questions per split. A row has the step at which validation reached
    `LEVEL`, accuracies on the test splits, and the curve of validation; from both stages and seed 0
    also the baselines of each split.
    """
    rows = []
    for kind in kinds:
        for seed in seeds:
            for start, name in STARTS.items():
                folder = work / f"tuned_{name}_{kind}_{seed}"
                chained = name == "shapes"
                base = (made if chained else work) / f"{name}_{kind}"
                fields = {"model.checkpoint": base, "validation.every": EVERY}
                result = quickstart.run(
                    *(folder, kind, True, seed, limit, fields), baselines=chained
                )
                curve = [
                    {"step": line["step"], "score": line["score"]} for line in validations(folder)
                ]
                tests = {
                    split: result["datasets"][split]["value"] / 100 for split in quickstart.SPLITS
                }
                row = {"llm": kind, "seed": seed, "start": start, "steps": steps_to(LEVEL, curve)}
                if chained and seed == 0:  # before tuning, of zeroed images, of the majority answer
                    row["baselines"] = {
                        split: {
                            name: baseline["accuracy"] / 100
                            for name, baseline in result["datasets"][split]["baselines"].items()
                        }
                        for split in quickstart.SPLITS
                    }
                rows.append({**row, **tests, "validations": curve})
    return rows


def cells(rows: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Returns the cells of the table of tunings (rows of `tune`), its head first, in percent."""
    head = ["llm", "seed", "start", f"steps to {LEVEL:.0%}", *quickstart.SPLITS]
    table = [head]
    for row in rows:
        steps = "never" if row["steps"] is None else str(row["steps"])
        accuracies = [f"{100 * row[split]:.1f}" for split in quickstart.SPLITS]
        table.append([row["llm"], str(row["seed"]), row["start"], steps, *accuracies])
    return table


def drawn(document: Mapping[str, Any]) -> bytes:
    """Returns a PNG image of the curves in `document`, the content of the JSON file."""
    panels = {"stage 1: recall": {"stage 1": document["stage1"]}}
    panels["stage 2: exact captions"] = document["stage2"]
    for row in document["tuning"]:
        panel = panels.setdefault(f"instruction tuning, {row['llm']}: accuracy", {})
        panel[f"{row['start']}, seed {row['seed']}"] = row["validations"]
    return curves.compared(panels, "score")


def report(path: pathlib.Path, document: Mapping[str, Any]) -> None:
    """Writes the HTML page of `document`: the curves of all runs, and the table of tunings."""
    head, *rows = cells(document["tuning"])
    parts = [curves.image(drawn(document)), page.table(head, rows)]
    page.write(path, "BLIP-2's stages on the drawn world", parts)


def main() -> None:
    """Runs what is missing, prints the table, and writes the JSON file and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work",
        type=pathlib.Path,
        default=pathlib.Path("runs/backbones"),
        help="WORK of launch/backbones.sh",
    )
    parser.add_argument(
        "--made",
        type=pathlib.Path,
        default=quickstart.ROOT / "jax_instructblip" / "embedded",
        help="OUT of launch/backbones.sh",
    )
    parser.add_argument("--kinds", nargs="+", choices=quickstart.KINDS, default=quickstart.KINDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, default=800, help="questions a split")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=quickstart.ROOT / "benchmarks" / "results" / "chain.json",
    )
    parser.add_argument("--draw", action="store_true", help="draw the curves of --out; run nothing")
    flags = parser.parse_args()
    picture = flags.out.with_suffix(".png")
    if flags.draw:
        picture.write_bytes(drawn(json.loads(flags.out.read_text())))
        print(f"written to {picture}")
        return
    work = flags.work.absolute()
    stage1 = validations(work / "stage1")
    stage2 = {kind: validations(work / f"stage2_{kind}") for kind in flags.kinds}
    document = {
        "command": "TOWERS=embedded bash launch/backbones.sh; python -m benchmarks.chain "
        f"--kinds {' '.join(flags.kinds)} --seeds {' '.join(map(str, flags.seeds))}",
        "scoring": "stage 1: recall among 200 pairs, mean of R@1 both ways; stage 2 and tuning: "
        "exact match of whole answers, mean of the families of questions",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "stage1": stage1,
        "stage2": stage2,
        "tuning": tune(work, flags.made.absolute(), flags.kinds, flags.seeds, flags.limit),
    }
    for row in cells(document["tuning"]):
        print("  ".join(f"{cell:>15}" for cell in row))
    report(work / "chain.html", document)
    flags.out.write_text(json.dumps(document, indent=1) + "\n")
    picture.write_bytes(drawn(document))
    print(f"written to {flags.out}, {picture} and {work / 'chain.html'}")


if __name__ == "__main__":
    main()
