"""Runs a verb of the command line, then prints the peak memory of its process in bytes.

python -m tests.helpers.peak_memory train --config ...
"""

import resource
import sys

from jax_instructblip.__main__ import main

if __name__ == "__main__":
    status = main(sys.argv[1:])
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}", flush=True)
    sys.exit(status)
