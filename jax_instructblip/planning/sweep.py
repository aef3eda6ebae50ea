"""Plans of one config on several meshes and batch sizes, and the recommended one."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jax_instructblip.files import read_json
from jax_instructblip.planning import advice
from jax_instructblip.planning.chips import GIB
from jax_instructblip.planning.job import read_job, read_variant
from jax_instructblip.planning.topology import read_topology
from jax_instructblip.training.config_fields import check_config
from jax_instructblip.training.config_file import change_fields


def sweep(
    config: ConfigDict,
    words: Sequence[str],
    topology: str,
    *,
    step: str = "train",
    effort: str = "quick",
    tries: int = 6,
) -> dict[str, Any]:
    """Plans several meshes and batch sizes, each in its own process, and picks the best plan.

    A compiler that crashes or runs out of memory then ends one plan only. Prints each plan as it
    finishes, and a table at the end.

    Args:
        config: the fields of `configs/common.py`.
        words: the same config as command-line flags, for the other processes: `--config FILE
            --config.F=V`.
        topology: chips, as in `v5e:4x4`.
        step: "train" or "decode".
        effort: the compiler's effort, a key of `EFFORTS`.
        tries: the largest number of plans to make.

    Returns:
        `recommended`, the best plan or None, and `tried`, all plans that were made: dicts as of
        `make_report`.

    Raises:
        ValueError: the config or the topology is invalid, or no mesh holds the model.
    """
    check_config(config)
    chips = read_topology(topology)
    _, variant = read_variant(config)
    field = "data.batch_size" if step == "train" else "validation.batch_size"
    asked = read_job(config, variant, step)
    first = asked.batch
    reports, tried = [], []
    for batch in dict.fromkeys((first, first // 2, first * 2)):
        job = read_job(change_fields(config, {field: batch}), variant, step)
        tried += [(batch, sizes) for sizes in advice.feasible_meshes(job, chips)]
    if not tried:
        hints = ["--config.model.remat.llm=full", "--config.train.accumulate=2"]
        if variant.llm is None:  # its pairs are compared within a whole batch
            hints = ["--config.model.remat.qformer=full"]
        raise ValueError(
            f"no mesh of {len(chips.devices)} chips holds this model and what a step keeps, or "
            f"none divides a batch of {first}: take more chips, another batch, or "
            f"{' or '.join(hints)}"
        )
    # The config's batch size first; then meshes with the least estimated traffic.
    tried.sort(
        key=lambda each: (each[0] != first, advice.estimated_traffic(asked, each[0], each[1]))
    )
    for number, (batch, sizes) in enumerate(tried[:tries], 1):
        mesh = ",".join(map(str, sizes))
        print(f"{number}/{min(len(tried), tries)}: mesh {mesh}, batch {batch}", flush=True)
        more = ["--topology", topology, "--mesh", mesh, "--step", step, "--effort", effort]
        report = elsewhere([*words, f"--config.{field}={batch}", *more])
        if "verdict" in report:
            reports.append(report)
        print(f"  {report.get('verdict', report.get('error'))}", flush=True)
    chosen = advice.best(reports, first)
    print("\n".join(table(reports)))
    if chosen is None:
        print("none of these fits: raise --tries, or take more chips")
    else:
        mesh = ",".join(str(size) for size in chosen["mesh"].values())
        print(f"recommended: --mesh {mesh}, batch {chosen['batch']}")
    return {"recommended": chosen, "tried": reports}


def table(reports: list[dict[str, Any]]) -> Iterator[str]:
    """Yields the lines of a table of plans (`make_report`): a header, then a line per plan."""
    yield "mesh          batch  need GiB  fits  moved GiB  products s  links s"
    for each in reports:
        mesh = ",".join(str(size) for size in each["mesh"].values())
        bounds = each.get("bounds", {"compute": float("nan"), "links": float("nan")})
        yield (
            f"{mesh:12} {each['batch']:6} {each['memory']['need'] / GIB:9.2f}  "
            f"{'yes' if each['fits'] else 'no':4}  {each['moved_bytes'] / GIB:9.2f}  "
            f"{bounds['compute']:10.3f}  {bounds['links']:7.3f}"
        )


def elsewhere(words: Sequence[str]) -> dict[str, Any]:
    """The plan (`make_report`) that another process makes: the command `plan` with flags `words`.

    If that process fails, the result is {"error": the last line of its output}.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        command = [sys.executable, "-m", "jax_instructblip", "plan", *words, "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if path.is_file():
            return read_json(path, dict, allow_nan=True)
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"error": last[0]}
