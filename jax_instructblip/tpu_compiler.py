"""Flags for the TPU compiler, which must be set before it is loaded."""

import os

# A larger stack for the compiler's threads: on long chains of products it recurses so deeply that
# compiling a 13B model's step crashed (libtpu 0.0.42). The compiled programs do not change.
STACK = "--fibers_default_thread_stack_size=4194304"


def set_flags() -> None:
    """Adds `STACK` to the environment variable `LIBTPU_INIT_ARGS`; harmless without a TPU.

    `STACK` is a flag for a larger stack. What the variable has already is kept, also another value
    of that flag.
    """
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    if STACK.partition("=")[0] not in flags:
        os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {STACK}".strip()
