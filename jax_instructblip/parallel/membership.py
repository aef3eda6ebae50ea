"""The place of this process in its run: from flags, the environment or Slurm.

Every process of a run starts the same command. Its number, the count of processes and the address
of process 0 come from flags, from the environment (`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`,
`JAX_PROCESS_ID`) or from Slurm; on a TPU pod JAX detects them (`--coordinator auto`). Without any
of these the process works alone.
"""

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping

from jax_instructblip.parallel import peers

AUTO = "auto"  # JAX detects coordinator, count and index, as it can on a TPU pod
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PORT = 12_321  # the coordinator's port under Slurm; the rendezvous uses the next port


class ClusterError(ValueError):
    """Raised when processes cannot work together as one run; the message says why."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The place of this process in its run.

    Attributes:
      coordinator: HOST:PORT at which process 0 answers, or `AUTO`.
      count: the number of processes.
      index: the number of this process, from 0.
    """

    coordinator: str
    count: int
    index: int

    def __post_init__(self):
        if self.coordinator == AUTO:
            return
        host, _, port = self.coordinator.rpartition(":")
        wrong = []
        if not host or not port.isdecimal():
            wrong.append(f"coordinator is {self.coordinator!r}, expected HOST:PORT")
        if self.count < 1:
            wrong.append(f"processes is {self.count}, expected at least 1")
        elif not 0 <= self.index < self.count:
            wrong.append(f"process is {self.index}, expected 0 to {self.count - 1}")
        if wrong:
            raise ClusterError("; ".join(wrong))

    def rendezvous_address(self) -> tuple[str, int]:
        """Host and port where the processes meet: the coordinator's host, and the next port."""
        host, _, port = self.coordinator.rpartition(":")
        return host, int(port) + 1


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that give a command its place among several processes, and two time limits."""
    group = parser.add_argument_group("several processes (the launchers in launch/ set these)")
    group.add_argument("--coordinator", default="", help=f"HOST:PORT of process 0, or {AUTO!r}")
    group.add_argument("--processes", type=int, default=0, help="how many there are")
    group.add_argument("--process", type=int, default=-1, help="which of them this one is")
    group.add_argument(
        "--wait_limit", type=float, default=300.0, help="seconds to wait for the others (300)"
    )
    group.add_argument(
        "--silence_limit",
        type=float,
        default=peers.LIMIT,
        help="seconds after which a process that is not heard of counts as lost (100)",
    )


def read_flags(flags: argparse.Namespace) -> tuple[Cluster | None, float, float]:
    """The arguments of `cluster.joined`: place of this process, and two limits in seconds.

    `flags` come from a parser to which `add_flags` was applied. The place may also come from the
    environment or Slurm (`find_cluster`).
    """
    cluster = find_cluster(flags.coordinator, flags.processes, flags.process)
    return cluster, flags.wait_limit, flags.silence_limit


def find_cluster(
    coordinator: str = "",
    processes: int = 0,
    process: int = -1,
    environ: Mapping[str, str] | None = None,
) -> Cluster | None:
    """The place of this process, from the arguments, `environ` or Slurm; None if it works alone.

    Args:
        coordinator: HOST:PORT of process 0, or `AUTO`; "" if not given.
        processes: how many there are; 0 if not given.
        process: the number of this one, from 0; -1 if not given.
        environ: the environment; None for that of this process.

    Raises:
        ClusterError: the settings are incomplete or invalid.
    """
    environ = os.environ if environ is None else environ
    if coordinator == AUTO:
        return Cluster(AUTO, 0, 0)
    from_flags = (coordinator, str(processes or ""), str(process if process >= 0 else ""))
    for source, names in (
        (from_flags, ("--coordinator", "--processes", "--process")),
        (tuple(environ.get(name, "") for name in VARIABLES), VARIABLES),
    ):
        if not any(source):
            continue
        missing = [name for name, value in zip(names, source, strict=True) if not value]
        if missing:
            raise ClusterError(f"{' and '.join(missing)}: needed beside the others of {names}")
        if not (source[1].isdecimal() and source[2].isdecimal()):
            raise ClusterError(
                f"{names[1]} is {source[1]!r}, {names[2]} is {source[2]!r}, expected whole numbers"
            )
        return Cluster(source[0], int(source[1]), int(source[2]))
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_PROCID" in environ and int(tasks) > 1:
        host = first_host(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"])
        # Jobs that share a node need ports of their own.
        port = PORT + 2 * (int(environ.get("SLURM_JOB_ID", "0")) % 10_000)
        return Cluster(f"{host}:{port}", int(tasks), int(environ["SLURM_PROCID"]))
    return None


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[07-09,12],login1` -> `gpu07`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    if match is None:
        raise ClusterError(
            f"Slurm's list of nodes is {nodes!r}, expected hosts as in gpu[07-09,12]: give "
            "--coordinator HOST:PORT"
        )
    return match[1] + (match[2] or "")
