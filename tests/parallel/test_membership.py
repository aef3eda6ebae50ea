"""The place of a process among others, by flags, environment and Slurm."""

import pytest

from jax_instructblip.parallel import membership
from jax_instructblip.parallel.membership import Cluster, ClusterError, find_cluster, first_host

SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "40001",
}


def test_alone_unless_somebody_says_otherwise():
    assert find_cluster(environ={}) is None
    assert find_cluster(environ={"SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "a"}) is None


def test_flags_go_before_the_environment_and_that_before_slurm():
    variables = dict(zip(membership.VARIABLES, ("host:1", "4", "2"), strict=True))
    assert find_cluster("other:2", 3, 0, variables) == Cluster("other:2", 3, 0)
    assert find_cluster(environ=variables | SLURM) == Cluster("host:1", 4, 2)
    port = membership.PORT + 2
    assert find_cluster(environ=SLURM) == Cluster(f"gpu07:{port}", 8, 3)
    assert find_cluster("auto", environ=SLURM).coordinator == "auto"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a", "a"), ("a,b", "a"), ("gpu[07-09,12],login1", "gpu07"), ("n-1-[3,5]", "n-1-3")],
)
def test_first_host_of_slurms_list(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", 0, 1), "--processes: needed beside the others"),
        (("", 2, -1), "--coordinator and --process: needed"),
        (("host", 2, 1), "coordinator is 'host', expected HOST:PORT"),
        (("host:1", 2, 2), "process is 2, expected 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ClusterError, match=message):
        find_cluster(*given, environ={})


def test_numbers_in_the_environment_are_whole():
    environ = dict(zip(membership.VARIABLES, ("host:1", "four", "2"), strict=True))
    with pytest.raises(ClusterError, match="PROCESSES is 'four', .*, expected whole numbers"):
        find_cluster(environ=environ)
