import jax.numpy as jnp
import pytest

from jax_instructblip.evaluation import placement
from jax_instructblip.evaluation.placement import check_memory, choose_mesh
from jax_instructblip.models.variants import VARIANTS
from jax_instructblip.parallel.mesh import make_mesh
from tests.micro import micro


def test_the_only_device_needs_no_mesh():
    assert choose_mesh(micro("t5"), jnp.float32) is None


@pytest.mark.parametrize(("fsdp", "tensor"), [(2, 1), (1, 3)])
def test_more_devices_than_there_are(fsdp, tensor):
    with pytest.raises(ValueError, match="does not use the 1 devices there are"):
        choose_mesh(micro("t5"), jnp.float32, fsdp=fsdp, tensor=tensor)
    with pytest.raises(ValueError, match="--fsdp 0 --tensor 1: expected at least 1"):
        choose_mesh(micro("t5"), jnp.float32, fsdp=0)


def test_weights_larger_than_a_device_are_refused_before_they_are_read(monkeypatch):
    monkeypatch.setattr(placement, "device_memory", lambda: 16_000_000_000)
    check_memory(VARIANTS["instructblip-flan-t5-xl"], jnp.bfloat16, None)
    message = "take 28.* GB of each device in bfloat16, and it has 16.0 GB: split .* --tensor"
    for mesh in (None, make_mesh()):
        with pytest.raises(ValueError, match=message):
            check_memory(VARIANTS["instructblip-vicuna-13b"], jnp.bfloat16, mesh)
    monkeypatch.setattr(placement, "device_memory", lambda: 0)  # not known
    check_memory(VARIANTS["instructblip-vicuna-13b"], jnp.float32, None)
