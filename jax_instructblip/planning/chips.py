"""The chips that steps are planned for: what one has, and the sizes that are offered."""

import dataclasses

GIB = 2**30
EFFORTS = {  # of the compiler, by the names of `plan --effort`
    "quick": -1.0,  # the least that it knows; a third of the time, a little more memory
    "full": 0.0,  # as for a real run
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """The maker's figures of one chip.

    Attributes:
      memory: bytes of HBM that a program may use (libtpu 0.0.42 keeps the rest for itself).
      flops: bfloat16 operations a second at most.
      bandwidth: bytes a second between HBM and the chip.
      links: bytes a second between the chip and its neighbours, all links of one direction.
      clock: cycles a second, in which the compiler states times.
      sizes: what is known to be offered, as examples.
      options: what the compiler must be told of this kind.
    """

    memory: float
    flops: float
    bandwidth: float
    links: float
    clock: float
    sizes: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()


CHIPS = {
    # The compiler knows half chips, too; `megacore` makes one device of both.
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
    """Names of topologies, as examples; the compiler takes further sizes."""
    return [f"{kind}:{size}" for kind, chip in CHIPS.items() for size in chip.sizes] + ["cpu:8"]
