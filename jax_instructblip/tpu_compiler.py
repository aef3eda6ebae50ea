"""The flags that the compiler of TPUs needs before it is loaded."""

import os

# Products within products make it recurse deeper than the stacks of its threads reach: the step of
# a 13B model ended in a segmentation fault (libtpu 0.0.42). It changes nothing of a program.
STACK = "--fibers_default_thread_stack_size=4194304"


def set_flags() -> None:
    """Adds to `LIBTPU_INIT_ARGS`; what is set there already stays. Harmless without a TPU."""
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    if STACK.partition("=")[0] not in flags:
        os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {STACK}".strip()
