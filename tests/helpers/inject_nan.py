"""Runs the command line with a NaN loss in some steps of the training.

python -m tests.helpers.inject_nan 3,4 train --config ...
"""

import sys

import jax
import numpy as np

from jax_instructblip.__main__ import main
from jax_instructblip.training import loop


def inject_nan(compile_step, steps):
    """`compile_step` but for frozen weights, which are no numbers in these of the steps made."""
    count = [0]

    def compile_with_nan(**settings):
        step = compile_step(**settings)

        def call(state, frozen, batch, rng):
            count[0] += 1
            if count[0] in steps:
                frozen = jax.tree.map(lambda leaf: leaf * np.float32("nan"), frozen)
            return step(state, frozen, batch, rng)

        call.lower = step.lower
        return call

    return compile_with_nan


if __name__ == "__main__":
    loop.compile_step = inject_nan(loop.compile_step, set(map(int, sys.argv[1].split(","))))
    sys.exit(main(sys.argv[2:]))
