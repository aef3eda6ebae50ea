"""A checkpoint folder that loads and answers within seconds."""

import shutil
from pathlib import Path

from jax_instructblip import checkpoint
from tests.helpers import golden

KINDS = {"t5": "instruct_t5", "llama": "instruct_vicuna"}


def write_checkpoint(folder: Path, kind: str, shared: Path) -> Path:
    """`folder`, with the recorded weights and tokenizers of a tiny model, 't5' or 'llama'."""
    pad = {"llm.pad_id": 400} if kind == "llama" else {}
    variant = golden.variant(KINDS[kind]).replace(**pad)
    tokenizers = shared / "golden" / "tokenizers"

    def extra(folder: Path) -> None:
        checkpoint.write_config(folder, {"variant": variant.to_dict(), "source": {}})
        if kind == "t5":
            shutil.copytree(tokenizers / "t5", folder / "tokenizer")
        else:  # without its configuration, which is not the released one
            (folder / "tokenizer").mkdir()
            shutil.copy(tokenizers / "llama" / "tokenizer.model", folder / "tokenizer")
        shutil.copytree(tokenizers / "bert", folder / "qformer_tokenizer")

    leaves = checkpoint.flatten(golden.params(KINDS[kind])).items()
    checkpoint.write_tree(folder, leaves, extra=extra)
    return folder
