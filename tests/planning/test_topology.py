import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from jax_instructblip.planning import topology
from tests.helpers.interpreter import run_python

with_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e .[tpu]"
)
with_cuda = pytest.mark.skipif(
    not topology.has_cuda(), reason="needs the CUDA compiler: pip install -e .[gpu]"
)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        *[("v5e:4x", "v5e:4x4"), ("v9:4x4", "v4:2x2x4"), ("v5e", "v5e:2x2"), ("cpu:0", "cpu:8")],
        *[
            ("h10:8", "h100:8"),
            ("h100:2x4", "h100:8"),
            ("a100:8", "a100-80:8"),
            ("v5e:4", "v5e:4x4"),
        ],
    ],
)
def test_unknown_names_are_answered_with_known_ones(name, hint):
    with pytest.raises(ValueError, match=f"unknown topology '{name}'.*{hint}"):
        topology.read_topology(name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:4x4", "tpu"), ("h200:1", "gpu")])
def test_without_the_compiler_it_says_what_to_install(monkeypatch, name, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"compile for {name} .* pip install -e '.\[{extra}\]'$"):
        topology.read_topology(name)


def test_machines_have_eight_gpus(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="'h100:12': machines have 8 GPUs each"):
        topology.read_topology("h100:12")


def test_more_devices_than_the_process_has():
    jax.devices()  # from now on JAX has what it has
    with pytest.raises(ValueError, match="cpu:4096: JAX has"):
        topology.read_topology("cpu:4096")


@with_compiler
def test_chips_that_are_not_there():
    code = """
from jax_instructblip.parallel.mesh import make_mesh
from jax_instructblip.planning.topology import read_topology
# 4 x 2 x 2 cuts the longest direction of the torus into two axes.
print(*make_mesh(4, 2, 2, read_topology("v4:2x2x4").devices).devices.shape)
for name in ("v5e:4x4", "v4:2x2x4", "v5p:2x2x4", "v6e:4x4", "v5e:1x1"):
    print(name, len(read_topology(name).devices))
try:
    read_topology("v5e:3x5")
except ValueError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    mesh, *found, refused = done.stdout.splitlines()
    assert mesh == "4 2 2"
    assert found == ["v5e:4x4 16", "v4:2x2x4 16", "v5p:2x2x4 16", "v6e:4x4 16", "v5e:1x1 1"]
    assert "the compiler knows no v5e:3x5" in refused and "4x4" in refused


@with_cuda
def test_gpus_that_are_not_there():
    done = run_python("""
from jax_instructblip.parallel.mesh import make_mesh
from jax_instructblip.planning.topology import read_topology
print(*make_mesh(4, 2, 2, read_topology("h100:16").devices).devices.shape)
for name in ("h200:1", "h100:8", "a100-40:2", "a100-80:16"):
    devices = read_topology(name).devices
    print(name, len(devices), devices[0].platform, len({each.process_index for each in devices}))
""")
    assert done.splitlines() == [
        "4 2 2",
        "h200:1 1 gpu 1",
        "h100:8 8 gpu 1",
        "a100-40:2 2 gpu 1",
        "a100-80:16 16 gpu 2",
    ]


@pytest.mark.parametrize(
    "name", ["cpu:100000000", "v5e:100000x100000", "cpu:" + "9" * 5000, "v4:" + "2x" * 5000 + "2"]
)
def test_more_chips_than_any_pod_has_are_refused_at_once(name):
    with pytest.raises(ValueError, match="has more than 16,384 chips") as error:
        topology.read_topology(name)
    assert len(str(error.value)) < 200
