"""Runs code in a new Python process, for tests that need one."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 600  # seconds
# Programs compile three times as fast with these, and tests spend most of their time on that. They
# hold for all processes of the tests, so what is compared to the bit is compiled alike.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
# Devices of a busy machine wait for each other longer than the 40 seconds after which XLA ends.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=600"


def run_python(code: str, *, devices: int = 1) -> str:
    """The output of the code, run in the project's root on so many devices of the CPU.

    Code that fails makes the test fail, with what it wrote to stderr.
    """
    return _run(["-c", textwrap.dedent(code)], devices)


def run_module(name: str, *words: str, devices: int = 1) -> str:
    """The output of `python -m name words`, run as by `run_python`."""
    return _run(["-m", name, *words], devices)


def _run(words: list[str], devices: int) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {PATIENT}".strip(),
        },
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
