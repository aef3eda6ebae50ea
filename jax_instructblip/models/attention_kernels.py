"""Kernels that compute attention over whole rows without holding its scores in memory.

`cudnn` is for NVIDIA's GPUs, `splash` for TPUs. Each has conditions; what does not meet them stays
with the einsums of `attention.attend`. A kernel rounds its numbers in another order than they do.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jax_instructblip.models.layers import BATCH_AXES

CUDNN_WIDTHS = range(8, 129, 8)  # widths of heads that cuDNN has on all GPUs since A100
SPLASH_WIDTHS = (128, 256)  # of wider heads the gradient's blocks do not fit a core's own memory
LANES = 128  # splash attention's blocks have a multiple of as many slots
BLOCK = 1024  # most slots of a block: its scores are in a core's own memory
HEAD_AXIS = "tensor"  # the mesh axis that splits heads


class CausalRows(NamedTuple):
    """The mask of a causal model, and the segments that `masks.causal_mask` makes it from.

    `segments` holds the number of the sample in each slot, 0 on padding.
    """

    mask: Bool[Array, "B 1 T T"]
    segments: Int[Array, "B T"]


def kernel_for(device: Any) -> str:
    """The kernel for devices like `device`, a `jax.Device`: "cudnn", "splash", or "" for none.

    "cudnn" is for NVIDIA's GPUs of compute capability 8.0 (A100) and above, "splash" for TPUs.
    """
    if device.platform == "tpu":
        return "splash"
    capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else 0
    return "cudnn" if float(capability or 0) >= 8 else ""


def takes(kernel: str, query: Array, key: Array, mask: Any, bias: Any, dropout: Any) -> bool:
    """True if a kernel, with its gradient, can take the place of `attend`'s einsums.

    `kernel` is a result of `kernel_for`; the other arguments are those of `attend`. Queries must be
    bfloat16 or float16. T5's learned bias and dropout of weights stay with the einsums. cuDNN takes
    a mask only where the numbers of queries and of keys are even. Splash attention takes bfloat16
    alone, and no mask but `CausalRows`, in rows that the current mesh divides evenly.
    """
    if bias is not None or dropout is not None:
        return False
    slots, width = query.shape[1], query.shape[-1]
    if kernel == "cudnn":
        even = mask is None or slots % 2 == key.shape[1] % 2 == 0
        return query.dtype in (jnp.bfloat16, jnp.float16) and even and width in CUDNN_WIDTHS
    if kernel != "splash" or not isinstance(mask, CausalRows) or not _divides(query.shape[0]):
        return False
    return query.dtype == jnp.bfloat16 and slots % LANES == 0 and width in SPLASH_WIDTHS


def _divides(rows: int) -> bool:
    """True if the current mesh, if there is one, has our axes and splits so many rows evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return True
    if not {*BATCH_AXES, HEAD_AXIS} <= set(mesh.axis_names):
        return False
    return rows % math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 0


def cudnn(query: Array, key: Array, value: Array, mask: Array | None, scale: float) -> Array:
    """Attention as `attention.attend` defines it, computed by a kernel of cuDNN.

    The shapes are those of `attend`; `mask` is boolean, and `takes` must be True of the arguments.
    """
    if mask is not None:
        mask = jnp.broadcast_to(mask, (mask.shape[0], 1, query.shape[1], key.shape[1]))
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, scale=scale, implementation="cudnn"
    )


def splash(
    query: Float[Array, "B T N K"],
    key: Float[Array, "B T Nk K"],
    value: Float[Array, "B T Nk K"],
    segments: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T N K"]:
    """Attention under `masks.causal_mask(segments)`, computed by JAX's splash attention.

    The scores are multiplied by `scale`. Each device of the current mesh computes its rows and
    heads, without a collective. Blocks of slots that no query may see are skipped.
    """
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return _splash_rows(query, key, value, segments)
    heads = HEAD_AXIS if key.shape[2] % mesh.shape[HEAD_AXIS] == 0 else None
    rows = PartitionSpec(BATCH_AXES)
    split = PartitionSpec(BATCH_AXES, None, heads)
    run = jax.shard_map(
        _splash_rows, in_specs=(split, split, split, rows), out_specs=split, check_vma=False
    )
    return run(query, key, value, segments)


def _splash_rows(query: Array, key: Array, value: Array, segments: Array) -> Array:
    """`splash` of the rows and heads of one device; the query is scaled."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    slots, heads, key_heads = *query.shape[1:3], key.shape[2]
    mask = masks.MultiHeadMask([masks.CausalMask((slots, slots))] * (heads // key_heads))
    sizes: dict[str, Any] = dict.fromkeys(_SIZES, block_size(slots))
    make = kernels.make_splash_mqa_single_device
    attend = make(mask, block_sizes=kernels.BlockSizes(**sizes))
    of_keys: Any = jax.vmap(attend, in_axes=(0, 0, 0, None))  # all key heads of a row

    def row(query: Array, key: Array, value: Array, segments: Array) -> Array:
        first = lambda x: jnp.moveaxis(x, 1, 0)  # heads before slots
        grouped = first(query).reshape(key_heads, -1, *query.shape[::2])
        ids = kernels.SegmentIds(segments, segments)
        mixed = of_keys(grouped, first(key), first(value), ids)
        return jnp.moveaxis(mixed.reshape(heads, *query.shape[::2]), 0, 1)

    return jax.vmap(row)(query, key, value, segments)


_SIZES = (
    *("block_q", "block_kv", "block_kv_compute"),
    *("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
    *("block_q_dq", "block_kv_dq"),
)


def block_size(slots: int) -> int:
    """The number of slots that splash attention computes together, as one block.

    It is the largest multiple of `LANES`, up to `BLOCK`, that divides `slots`, the length of a row.
    `slots` must itself be a multiple of `LANES`.
    """
    return max(size for size in range(LANES, BLOCK + 1, LANES) if slots % size == 0)
