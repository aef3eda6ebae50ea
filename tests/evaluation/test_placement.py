import jax.numpy as jnp
import pytest

from jax_instructblip.evaluation import placement
from jax_instructblip.evaluation.placement import check_memory, choose_mesh
from jax_instructblip.parallel.mesh import make_mesh
from tests.helpers.tiny import tiny_variant


def test_the_only_device_needs_no_mesh():
    assert choose_mesh(tiny_variant("t5"), jnp.float32) is None


@pytest.mark.parametrize(("fsdp", "tensor"), [(2, 1), (1, 3)])
def test_more_devices_than_there_are(fsdp, tensor):
    with pytest.raises(ValueError, match="does not use the 1 devices .* product is 1"):
        choose_mesh(tiny_variant("t5"), jnp.float32, fsdp=fsdp, tensor=tensor)
    with pytest.raises(ValueError, match="--fsdp 0 --tensor 1: expected at least 1"):
        choose_mesh(tiny_variant("t5"), jnp.float32, fsdp=0)


def test_weights_larger_than_a_device_are_refused_before_they_are_read(monkeypatch):
    message = r"take 0\.\d GB of each device in float32, and it has 0\.0 GB: split .* --tensor"
    for memory, fits in ((10**4, False), (10**9, True), (0, True)):  # 0: it is not known
        monkeypatch.setattr(placement, "device_memory", lambda memory=memory: memory)
        for mesh in (None, make_mesh()):
            if fits:
                check_memory(tiny_variant("t5"), jnp.float32, mesh)
                continue
            with pytest.raises(ValueError, match=message):
                check_memory(tiny_variant("t5"), jnp.float32, mesh)


def test_a_cpus_memory_is_shared_by_its_devices():
    assert placement.device_memory() > 10**8
