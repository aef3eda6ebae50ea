"""The description of a GPU that XLA's CUDA compiler reads in place of the device.

With it the compiler works on a machine that has neither a GPU nor a driver.
"""

from jax_instructblip.planning.chips import Chip, Gpu

# There is no device to time variants of products on, so these are left to cuBLAS.
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
_RESERVED = 1024  # bytes of a multiprocessor's shared memory that no block of threads may have


def target_config(name: str, chip: Chip, gpu: Gpu) -> str:
    """The description of a GPU as the text of XLA's `GpuTargetConfigProto`.

    `name` is what XLA is to call it; `gpu` is `chip.gpu`.
    """
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  name: "{name}" device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}"
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {gpu.cores} fpus_per_core: {gpu.units} clock_rate_ghz: {chip.clock / 1e9}
  device_memory_size: {gpu.total} memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {gpu.l2}
  device_address_bits: 64 ecc_enabled: true
  shared_memory_per_core: {gpu.shared} shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared - _RESERVED}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
