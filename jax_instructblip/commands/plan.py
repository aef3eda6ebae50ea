"""Predicts memory, FLOPs and communication of a step on TPUs or GPUs that need not be present.

    jax-instructblip plan --config configs/paper_vicuna_7b.py --topology v5e:4x4 --mesh 1,16,1
    jax-instructblip plan --config configs/paper_vicuna_7b.py --topology h100:8 --explain

The step is compiled by the compiler for those chips (extra `tpu` or `gpu`); no weights are read.
The exit code is 0 if it fits into their memory, else 1.
"""

import argparse
import json
from pathlib import Path

from jax_instructblip.atomic import unwritable, write_file
from jax_instructblip.commands.flags import check_flags
from jax_instructblip.commands.train import read_config
from jax_instructblip.planning.chips import EFFORTS, known

TRIES = 6  # plans of a sweep


def main(argv: list[str]) -> int:
    """Prints the plan, or the best of several with --sweep; returns 0 if it fits, else 1."""
    flags, rest = _parser().parse_known_args(argv)
    check_flags(flags, stores=("config",))
    config = read_config(rest)
    if flags.json is not None and (problem := unwritable(flags.json.parent)):
        raise OSError(f"--json is {flags.json}: {problem}; choose another file")
    common = {"step": flags.step, "effort": flags.effort}
    if flags.sweep and flags.explain:
        raise ValueError("--explain is about one plan: leave out --sweep, give the --mesh")
    if flags.sweep and flags.mesh:
        raise ValueError(f"--mesh is {flags.mesh}, but --sweep tries several: leave out either")
    if flags.tries is not None and not flags.sweep:
        raise ValueError(f"--tries is {flags.tries}: it is of a --sweep, add that or leave it out")
    if flags.sweep:
        from jax_instructblip.planning.sweep import sweep

        result = sweep(config, rest, flags.topology, tries=flags.tries or TRIES, **common)
        fits = result["recommended"] is not None
    else:
        from jax_instructblip.planning.report import lines, make_report

        result = make_report(
            config, flags.topology, mesh=flags.mesh, explained=flags.explain, **common
        )
        fits = result["fits"]
        print("\n".join(lines(result)))
    if flags.json is not None:
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        write_file(flags.json, json.dumps(result, indent=1) + "\n")
    return 0 if fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-instructblip plan",
        usage="%(prog)s --config FILE --topology NAME [--config.FIELD=VALUE ...]",
        description=__doc__,
        epilog=f"Topologies: {', '.join(known())}; the compiler takes further sizes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--topology", required=True, metavar="NAME", help="chips, as in v5e:4x4 or h100:8")
    add("--mesh", default="", metavar="D,F,T", help="sizes of data, fsdp, tensor (the config's)")
    add("--step", choices=("train", "decode"), default="train", help="what is compiled (train)")
    add("--sweep", action="store_true", help="tries meshes and batches, recommends one")
    add("--tries", type=int, metavar="N", help=f"most plans of a sweep ({TRIES})")
    add("--effort", choices=tuple(EFFORTS), default="quick", help="of the compiler (quick)")
    add("--explain", action="store_true", help="lists the largest arrays and the copies, too")
    add("--json", type=Path, metavar="FILE", help="writes the plan there, too")
    return parser
