"""Flags for the TPU compiler, which must be set before it is loaded."""

import os

# A larger stack for the compiler's threads: on long chains of products it recurses so deeply that
# compiling a 13B model's step crashed (libtpu 0.0.42). The compiled programs do not change.
STACK = "--fibers_default_thread_stack_size=4194304"


def set_flags() -> None:
    """Adds our flags to `LIBTPU_INIT_ARGS`, keeping what is set; harmless without a TPU."""
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    if STACK.partition("=")[0] not in flags:
        os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {STACK}".strip()
