"""The suite `convert`: a Hugging Face folder is read, checked and written again.

Ours writes a checkpoint folder (`convert`), transformers its own (`from_pretrained`,
`save_pretrained`). What is compared is the time and, above all, the memory that it takes.
"""

import pathlib
import shutil

from benchmarks.sides import Built, Case
from benchmarks.workload import SIZES


def cases(sizes: str) -> list[Case]:
    """Returns the cases of a size of models, a key of `workload.SIZES`."""
    return [{"variant": name} for name in SIZES[sizes]]


def ours(case: Case) -> Built:
    """Returns our side: it converts the case's folder to a checkpoint folder of this package."""
    from jax_instructblip import checkpoint
    from jax_instructblip.conversion.hf_folder import convert_hf

    out = pathlib.Path(case["work"], "converted")

    def call() -> None:
        shutil.rmtree(out, ignore_errors=True)
        checkpoint.write_tree(out, convert_hf(case["folder"]).leaves)

    return Built(call)


def transformers(case: Case) -> Built:
    """Returns the side of transformers: it loads the case's folder and saves a copy."""
    from benchmarks import theirs

    out = pathlib.Path(case["work"], "saved")

    def call() -> None:
        shutil.rmtree(out, ignore_errors=True)
        with theirs.quiet():
            theirs.load(case).save_pretrained(out)

    return Built(call)


SIDES = {"jax_instructblip": ours, "transformers": transformers}
