"""The TPU chips that steps can be planned for: figures of each, and sizes that clouds offer."""

import dataclasses

GIB = 2**30
EFFORTS = {  # the compiler's effort, by the names of `plan --effort`
    "quick": -1.0,  # the least effort: a third of the time, a plan of a little more memory
    "full": 0.0,  # as for a real run
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """The maker's figures for one chip.

    Attributes:
      memory: bytes of HBM that a program may use (libtpu 0.0.42 keeps the rest for itself).
      flops: peak bfloat16 operations per second.
      bandwidth: bytes per second between HBM and the chip.
      links: bytes per second between the chip and its neighbours, all links of one direction.
      clock: cycles per second; the compiler states times in cycles.
      sizes: examples of sizes that clouds offer: chips in each direction.
      options: options (name, value) that the compiler needs for this kind of chip.
    """

    memory: float
    flops: float
    bandwidth: float
    links: float
    clock: float
    sizes: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()


CHIPS = {
    # A chip has two cores; `megacore` makes them one device.
    "v4": Chip(
        *(30.75 * GIB, 275e12, 1228e9, 300e9, 1.05e9),
        sizes=("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x8x8", "8x8x16"),
        options=(("chip_config_name", "megacore"),),
    ),
    "v5e": Chip(
        *(15.75 * GIB, 197e12, 819e9, 200e9, 1.5e9),
        sizes=("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    ),
    "v5p": Chip(
        *(95.74 * GIB, 459e12, 2765e9, 600e9, 1.75e9),
        sizes=("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x8x8", "8x8x16"),
    ),
    "v6e": Chip(
        *(31.25 * GIB, 918e12, 1640e9, 448e9, 1.75e9),
        sizes=("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    ),
}


def known() -> list[str]:
    """Names of topologies, such as `v5e:4x4`, as examples; the compiler takes further sizes."""
    return [f"{kind}:{size}" for kind, chip in CHIPS.items() for size in chip.sizes] + ["cpu:8"]
