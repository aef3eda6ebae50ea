"""The paper's runs compiled at full size for TPUs and GPUs, by `jax-instructblip plan`.

python -m benchmarks.plans [--only TEXT] [--again] [--list | --tables]

Needs the compilers (extras `tpu` and `gpu`), a few gigabytes of memory, and one to three minutes
per plan. Writes `plan_paper.json`, `plan_tuning.json`, `plan_scaling.json`, `plan_llava.json`,
`plan_decode.json` and `plan_gpu.json` to `results`.
Plans that are there already are kept unless `--again` is given. `--tables` prints the results in
the format of `launch/README.md`.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

from jax_instructblip.atomic import write_file
from jax_instructblip.planning.chips import GIB
from jax_instructblip.planning.explain import MIB

RESULTS = pathlib.Path(__file__).parent / "results"
CONFIGS = {
    "xl": "configs/paper_flan_t5_xl.py",
    "xxl": "configs/paper_flan_t5_xxl.py",
    "7b": "configs/paper_vicuna_7b.py",
    "13b": "configs/paper_vicuna_13b.py",
    "stage1": "configs/blip2_stage1.py",
    "retrieval": "configs/blip2_retrieval_vit_g.py",
    "caption_2.7b": "configs/blip2_caption_opt_2_7b.py",
    "caption_6.7b": "configs/blip2_caption_opt_6_7b.py",
    "vqa_2.7b": "configs/blip2_vqa_opt_2_7b.py",
    "vqa_xl": "configs/blip2_vqa_flan_t5_xl.py",
    "llava_1": "configs/llava_pretrain.py",
    "llava_2": "configs/llava_finetune.py",
    "llava_sqa": "configs/llava_scienceqa.py",
    "llava_1.5_1": "configs/llava_1_5_pretrain.py",
    "llava_1.5_2": "configs/llava_1_5_finetune.py",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One plan to make.

    Attributes:
      file: the results go to `plan_FILE.json`.
      config: a key of `CONFIGS`.
      topology, mesh: the chips and the mesh, as the flags of `plan` take them.
      flags: further words of the command.
      packed: take the rows of the paper's configs; else those have one sample a row.
    """

    file: str
    config: str
    topology: str
    mesh: str
    flags: tuple[str, ...] = ()
    packed: bool = False

    @property
    def words(self) -> list[str]:
        """The command-line words after `jax-instructblip`."""
        where = ["--topology", self.topology, "--mesh", self.mesh]
        plain = self.file in ("paper", "scaling") and not self.packed
        rows = ["--config.data.samples_per_row=1"] if plain else []
        return ["plan", "--config", CONFIGS[self.config], *where, *rows, *self.flags]


def batch(size: int) -> str:
    """Returns the flag that sets another batch size than the paper's."""
    return f"--config.data.batch_size={size}"


def named(checkpoint: str) -> str:
    """Returns the flag that names a released model."""
    return f"--config.model.checkpoint={checkpoint}"


GPU_MESHES = {  # of training, of answering
    "h200:1": ("1,1,1", "1,1,1"),
    "h100:8": ("1,8,1", "8,1,1"),
    "a100-80:8": ("1,8,1", "8,1,1"),
}
DOTS, DECODE = "--config.model.remat.qformer=dots", ("--step", "decode")
CASES = (
    Case("paper", "xl", "v5e:4x4", "1,16,1"),
    Case("paper", "xl", "v4:2x2x4", "16,1,1"),
    Case("paper", "xl", "v5p:2x2x4", "16,1,1"),
    Case("paper", "xl", "v6e:4x4", "16,1,1"),
    Case("paper", "xxl", "v5e:4x4", "1,16,1"),
    Case("paper", "xxl", "v4:2x2x4", "8,2,1"),
    Case("paper", "xxl", "v5p:2x2x4", "16,1,1"),
    Case("paper", "xxl", "v6e:4x4", "8,2,1"),
    Case("paper", "7b", "v5e:4x4", "1,16,1"),
    Case("paper", "7b", "v4:2x2x4", "16,1,1", (DOTS,)),
    Case("paper", "7b", "v5p:2x2x4", "16,1,1"),
    Case("paper", "7b", "v6e:4x4", "16,1,1"),
    Case("paper", "7b", "v6e:4x4", "16,1,1", (DOTS,)),
    Case("paper", "13b", "v5e:4x4", "1,16,1"),
    Case("paper", "13b", "v4:2x2x4", "8,2,1"),
    Case("paper", "13b", "v5p:2x2x4", "16,1,1"),
    Case("paper", "13b", "v6e:4x4", "8,2,1"),
    Case("paper", "xl", "v5e:4x4", "1,16,1", packed=True),
    Case("paper", "xxl", "v5e:4x4", "1,16,1", packed=True),
    Case("paper", "7b", "v5e:4x4", "1,16,1", packed=True),
    Case("paper", "13b", "v5e:4x4", "1,16,1", packed=True),
    Case("scaling", "7b", "v5p:1x1x1", "1,1,1", (batch(8),)),
    Case("scaling", "7b", "v5p:2x2x2", "1,8,1", (batch(64),)),
    Case("scaling", "7b", "v5e:4x4", "1,16,1"),
    Case("scaling", "7b", "v5p:2x2x4", "16,1,1"),
    Case("scaling", "7b", "v5e:8x8", "1,64,1", (batch(512),)),
    Case("scaling", "7b", "v5e:8x8", "4,16,1", (batch(512),)),
    Case("scaling", "7b", "v5e:8x8", "8,1,8", (batch(64),)),
    Case("scaling", "7b", "v5p:4x8x8", "2,128,1", (batch(2048),)),
    Case("tuning", "stage1", "v5e:4x4", "16,1,1", ("--config.model.remat.qformer=full",)),
    Case("tuning", "retrieval", "v5e:4x4", "1,16,1", ("--config.model.remat.qformer=full",)),
    Case("tuning", "caption_2.7b", "v5e:4x4", "1,16,1"),
    Case("tuning", "caption_6.7b", "v5e:4x4", "1,16,1"),
    Case("tuning", "vqa_xl", "v5e:4x4", "1,16,1"),
    Case("tuning", "vqa_2.7b", "v5p:2x2x4", "16,1,1"),
    Case("llava", "llava_1", "v5e:4x4", "1,16,1", (named("llava-7b"),)),
    Case("llava", "llava_2", "v5e:4x4", "1,16,1", (named("llava-7b"),)),
    Case("llava", "llava_2", "v5p:2x2x4", "1,16,1", (named("llava-13b"),)),
    Case("llava", "llava_sqa", "v5p:2x2x4", "1,16,1", (named("llava-7b"),)),
    Case("llava", "llava_1.5_1", "v5e:4x4", "1,16,1", (named("llava-1.5-7b"),)),
    Case("llava", "llava_1.5_2", "v5p:2x2x4", "1,16,1", (named("llava-1.5-7b"),)),
    Case("decode", "7b", "v5e:4x4", "1,1,16", DECODE),
    Case("decode", "13b", "v5e:4x4", "2,1,8", DECODE),
    *(
        Case("gpu", config, topology, mesh, flags)
        for topology, meshes in GPU_MESHES.items()
        for mesh, flags in zip(meshes, ((), DECODE), strict=True)
        for config in ("7b", "13b", "xl", "xxl")
    ),
)
COMPILERS = {"gpu": "jax-cuda12-pjrt"}  # distributions of compilers; of the other files libtpu


def shorten(report: dict[str, Any]) -> dict[str, Any]:
    """Returns the parts of a `plan` report that are stored: GiB, FLOPs, time bounds, verdict."""
    gib = {name: round(size / GIB, 2) for name, size in report["memory"].items() if size}
    same = ("model", "step", "topology", "chips", "batch", "lengths", "accumulate", "effort")
    return {name: report[name] for name in same} | {
        "mesh": list(report["mesh"].values()),
        "rows": report["rows"],
        "remat_llm": report["remat"]["llm"],
        "remat_qformer": report["remat"]["qformer"],
        "remat_vision": report["remat"]["vision"],
        "gib": gib,
        "flops": {
            "counted": report["flops"]["counted"],
            "over_floor": report["flops"]["ratio"],
            "useful": report["flops"]["useful"],
        },
        "received_gib": {
            kind: [row["count"], round(row["bytes"] / GIB, 3)]
            for kind, row in report["moved"].items()
        },
        "bounds_s": {name: round(value, 4) for name, value in report["bounds"].items()},
        "token_mib": {name: round(size / MIB, 2) for name, size in report.get("token", {}).items()},
        "seconds": report["seconds"],
        "fits": report["fits"],
        "verdict": report["verdict"],
    }


def run(case: Case) -> dict[str, Any]:
    """Makes a plan in a new process; returns the shortened report and its command.

    Raises:
        RuntimeError: the process wrote no plan; the message has the end of its stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "plan.json")
        command = [sys.executable, "-m", "jax_instructblip", *case.words, "--json", str(path)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if not path.is_file():
            raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-500:]}")
        row = {"command": " ".join(["jax-instructblip", *case.words])}
        row |= shorten(json.loads(path.read_text(encoding="utf-8")))
    own = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return row | {"processor_seconds": round(own)}


NAMES = {
    "instructblip-flan-t5-xl": "FlanT5-XL",
    "instructblip-flan-t5-xxl": "FlanT5-XXL",
    "instructblip-vicuna-7b": "Vicuna-7B",
    "instructblip-vicuna-13b": "Vicuna-13B",
    "blip2-opt-2.7b": "OPT-2.7B",
    "blip2-opt-6.7b": "OPT-6.7B",
    "instructblip-opt-2.7b": "OPT-2.7B",
    "blip2-stage1": "ViT-g",
    "llava-7b": "LLaVA 7B",
    "llava-13b": "LLaVA 13B",
    "llava-1.5-7b": "LLaVA 1.5 7B",
}
TASKS = {
    "llava_pretrain": "first stage",
    "llava_finetune": "second stage",
    "llava_scienceqa": "ScienceQA",
    "llava_1_5_pretrain": "first stage",
    "llava_1_5_finetune": "second stage",
    "blip2_stage1": "first stage",
    "blip2_retrieval": "retrieval",
    "blip2_caption": "captions",
    "blip2_vqa": "questions",
}


def paper_row(row: dict[str, Any], task: str = "") -> str:
    """Returns a Markdown table row about one of the paper's training runs, a result of `run`.

    `task` is written after the model's name.
    """
    gib, bounds = row["gib"], row["bounds_s"]
    again, shared = row["remat_qformer"], row.get("rows", {}).get("samples", 1)
    rows = f" in rows of {shared}" if shared > 1 else ""
    more = "" if again == "none" else f"; `model.remat.qformer={again}`"
    cells = (
        f"{NAMES[row['model']]}{task}, {row['batch']}{rows}",
        row["topology"],
        ",".join(map(str, row["mesh"])) + more,
        f"{gib['need']:.1f} of {gib['chip']:.1f}" + ("" if row["fits"] else " (does not fit)"),
        f"{sum(size for _, size in row['received_gib'].values()):.1f}",
        f"{bounds['compute']:.3f}",
        f"{bounds['links']:.3f}",
        f"{row['seconds']['compile']:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def tuning_row(row: dict[str, Any]) -> str:
    """Returns a row about a stage of BLIP-2 or LLaVA, or a tuning that trains the vision tower."""
    task = next(task for config, task in TASKS.items() if config in row["command"])
    return paper_row(row, f", {task}")


def scaling_row(row: dict[str, Any]) -> str:
    """Returns a Markdown table row about scaling to a number of chips."""
    sums = ("all-reduce", "reduce-scatter")
    received = {kind: size for kind, (_, size) in row["received_gib"].items()}
    summed = sum(size for kind, size in received.items() if kind in sums)
    cells = (
        str(row["chips"]),
        ",".join(map(str, row["mesh"])),
        str(row["batch"]),
        f"{row['gib']['need']:.1f}",
        f"{sum(received.values()) - summed:.2f} / {summed:.2f}",
        f"{row['bounds_s']['links']:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def decode_row(row: dict[str, Any]) -> str:
    """Returns a Markdown table row about decoding."""
    gib, bounds = row["gib"], row["bounds_s"]
    cells = (
        f"{NAMES[row['model']]}, {row['batch']}",
        row["topology"],
        ",".join(map(str, row["mesh"])),
        f"{gib['need']:.1f} of {gib['chip']:.1f}",
        f"{sum(size for _, size in row['received_gib'].values()):.1f}",
        f"{bounds['compute']:.3f}",
        f"{bounds['links']:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def gpu_row(row: dict[str, Any]) -> str:
    """Returns a Markdown table row about training or answering on GPUs."""
    gib, bounds = row["gib"], row["bounds_s"]
    kinds = ", ".join(f"{size:.1f} {kind}" for kind, (_, size) in row["received_gib"].items())
    cells = (
        f"{NAMES[row['model']]}, {row['step']}, {row['batch']}",
        row["topology"],
        ",".join(map(str, row["mesh"])),
        f"{gib['need']:.1f} of {gib['chip']:.1f}",
        kinds or "nothing",
        f"{bounds['compute']:.3f}",
        f"{bounds['links']:.3f}",
        "fits" if row["fits"] else row["verdict"].rpartition("; ")[2],
    )
    return f"| {' | '.join(cells)} |"


ROWS = {
    "paper": paper_row,
    "tuning": tuning_row,
    "scaling": scaling_row,
    "llava": tuning_row,
    "decode": decode_row,
    "gpu": gpu_row,
}


def tables() -> dict[str, list[str]]:
    """Returns the Markdown rows of each results file, by the keys of `ROWS`."""
    found = {}
    for file, line in ROWS.items():
        path = RESULTS / f"plan_{file}.json"
        found[file] = [line(row) for row in json.loads(path.read_text(encoding="utf-8"))["plans"]]
    return found


def main() -> None:
    """Makes the plans that do not exist yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="makes those whose command has this text")
    parser.add_argument("--again", action="store_true", help="makes also what is there already")
    parser.add_argument("--list", action="store_true", help="prints the commands, runs none")
    parser.add_argument("--tables", action="store_true", help="prints the results, runs none")
    flags = parser.parse_args()
    if flags.tables:
        print("\n\n".join("\n".join(rows) for rows in tables().values()))
        return
    for case in CASES:
        command = " ".join(["jax-instructblip", *case.words])
        if flags.only not in command:
            continue
        path = RESULTS / f"plan_{case.file}.json"
        # Read again each time, because another process may be adding plans.
        known = path.is_file()
        found: dict[str, Any] = json.loads(path.read_text("utf-8")) if known else {"plans": []}
        others = [row for row in found["plans"] if row.get("command") != command]
        if flags.list or (len(others) < len(found["plans"]) and not flags.again):
            print(command if flags.list else f"there: {command}", flush=True)
            continue
        start = time.perf_counter()
        try:
            row = run(case)
        except RuntimeError as error:
            print(f"{command}\n  failed: {error}", flush=True)
            continue
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else found
        made = {each["command"]: each for each in found["plans"]} | {command: row}
        same = [each for each in CASES if each.file == case.file]
        commands = [" ".join(["jax-instructblip", *each.words]) for each in same]
        found["plans"] = [made[each] for each in commands if each in made]
        compiler = COMPILERS.get(case.file, "libtpu")
        found[compiler] = importlib.metadata.version(compiler)
        write_file(path, json.dumps(found, indent=1) + "\n")
        print(f"{command}\n  {row['verdict']} ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
