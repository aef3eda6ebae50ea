"""The two sides of a comparison with transformers: a folder, its model in PyTorch, and ours.

`FOLDERS` names the folders: as forged for the released variants, the same with other seeds, and odd
sizes with every field that a source may set differently from the release.
"""

import functools
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from jax_instructblip.conversion.hf_folder import read_hf
from jax_instructblip.conversion.tables import qformer as qformer_table
from jax_instructblip.models.variants import Variant
from jax_instructblip.training.loss import IGNORE
from tests.helpers.rows import lay_out, read_text
from tests.helpers.stages import stages

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")

RELEASED = {"t5": "instructblip-flan-t5-xl", "vicuna": "instructblip-vicuna-7b"}
FOLDERS = tuple(f"{kind}-{form}" for kind in RELEASED for form in ("forged", "seed1", "odd"))

# Keys of config.json; image_token_index is the last id of the small vocabulary.
ODD = {
    "vision_config": dict(
        hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3,
        image_size=28, patch_size=7, layer_norm_eps=1e-5,
    ),
    "qformer_config": dict(
        vocab_size=71, hidden_size=40, intermediate_size=56, num_hidden_layers=6,
        num_attention_heads=5, encoder_hidden_size=36, max_position_embeddings=40,
        layer_norm_eps=1e-7,
    ),
    "num_query_tokens": 5,
    "image_token_index": 96,
}  # fmt: skip
ODD_TEXT = {
    "t5": dict(
        model_type="t5", vocab_size=97, d_model=44, d_kv=6, d_ff=52, num_layers=2,
        num_decoder_layers=3, num_heads=7, feed_forward_proj="gated-gelu",  # so the tanh one
        relative_attention_num_buckets=12, relative_attention_max_distance=20,
        layer_norm_epsilon=1e-5, decoder_start_token_id=0, scale_decoder_outputs=True,
        tie_word_embeddings=False,
    ),
    "vicuna": dict(
        model_type="llama", vocab_size=97, hidden_size=48, intermediate_size=70,
        num_hidden_layers=4, num_attention_heads=6, rms_norm_eps=1e-5, max_position_embeddings=64,
        tie_word_embeddings=False,
    ),
}  # fmt: skip


def write_odd(folder: Path, kind: str) -> None:
    """A Hugging Face folder of odd sizes."""
    config = transformers.InstructBlipConfig(**ODD, text_config=ODD_TEXT[kind])
    config.architectures = ["InstructBlipForConditionalGeneration"]
    with torch.device("meta"):
        model = transformers.InstructBlipForConditionalGeneration(config)
    tied = set(model.all_tied_weights_keys) - {"language_model.lm_head.weight"}
    shapes = {key: leaf.shape for key, leaf in model.state_dict().items() if key not in tied}
    config.save_pretrained(folder)
    save_file(draw({key: tuple(shape) for key, shape in shapes.items()}, 2), folder / WEIGHTS)


def write_seed(folder: Path, forged: Path, seed: int) -> None:
    """A copy of a forged folder with weights of another seed."""
    folder.mkdir()
    (folder / "config.json").write_text((forged / "config.json").read_text())
    shapes = {key: leaf.shape for key, leaf in load_file(forged / WEIGHTS).items()}
    save_file(draw(shapes, seed), folder / WEIGHTS)


def draw(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Weights that keep activations in range; no bias is 0 but the ViT's for keys."""
    random = np.random.default_rng(seed)
    made = {}
    for key, shape in shapes.items():
        values = random.standard_normal(shape, np.float32)
        if len(shape) == 1 and key.endswith("weight"):
            values = 1 + 0.1 * values
        elif key.endswith("bias"):
            values *= 0.1
        else:
            embedded = "embed" in key or "token" in key or "shared" in key
            values *= 0.3 if embedded else 0.7 * np.prod(shape[1:]) ** -0.5
        if key.endswith("qkv.bias"):
            np.split(values, 3)[1][:] = 0
        made[key] = values
    return made


WEIGHTS = "model.safetensors"


class Pair:
    """One folder as transformers and as we read it, and what both make of one batch."""

    def __init__(self, folder: Path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.torch = transformers.InstructBlipForConditionalGeneration.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        self.folder = folder
        self.variant, params = read_hf(folder)
        self.params = jax.tree.map(jnp.asarray, params)
        self.kind = self.variant.llm.kind
        self.config = json.loads((folder / "config.json").read_text())
        self.batch = batch(self.variant)

    @functools.cached_property
    def theirs(self) -> tuple[Any, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """The model's output with gradients taken, and (input, output) of each module."""
        seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}

        def record(name):
            def hook(_, args, kwargs, out):
                out = out if isinstance(out, torch.Tensor) else out[0]
                given = args[0] if args else next(iter(kwargs.values()), None)
                if isinstance(given, torch.Tensor):
                    # The patch norm runs a second time, on CLS alone, for an output nobody reads.
                    seen.setdefault(name, (given.detach().numpy(), out.detach().numpy()))

            return hook

        hooks = [
            module.register_forward_hook(record(name), with_kwargs=True)
            for name, module in self.torch.named_modules()
        ]
        out = self.torch(**self.inputs())
        out.loss.backward()
        for hook in hooks:
            hook.remove()
        return out, seen

    def inputs(self) -> dict[str, torch.Tensor]:
        """The batch as transformers takes it: placeholders for the image, then the text."""
        batch, queries = read_text(self.variant, self.batch), self.variant.visual_tokens
        rows, skip = len(batch["images"]), ((0, 0), (queries, 0))
        token = self.config["image_token_index"]
        mean, std = np.array(MEAN), np.array(STD)
        pixels = (batch["images"][:, 0] / 255 - mean) / std
        given = {
            "pixel_values": pixels.transpose(0, 3, 1, 2).astype(np.float32),
            "qformer_input_ids": batch["qformer_tokens"],
            "qformer_attention_mask": batch["qformer_mask"].astype(int),
            "input_ids": np.pad(batch["tokens"], skip, constant_values=token),
            "attention_mask": np.pad(batch["mask"].astype(int), skip, constant_values=1),
        }
        labels = batch["targets"]
        if self.kind == "llama":  # position t is scored with the label of t + 1
            labels = np.pad(labels, ((0, 0), (queries + 1, 0)), constant_values=IGNORE)[:, :-1]
        assert len(labels) == rows
        given["labels"] = labels
        return {
            name: torch.tensor(leaf, dtype=None if name == "pixel_values" else torch.long)
            for name, leaf in given.items()
        }

    @functools.cached_property
    def ours(self) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Any]:
        """((loss, values of `stages`), gradient of the Q-Former tree)."""
        return stages(self.variant)(self.params["qformer"], self.params, self.batch)

    def torch_gradients(self) -> dict[str, np.ndarray]:
        """Their gradients by the paths of our Q-Former tree, moved as its weights are."""
        _ = self.theirs  # takes the gradients
        given = {
            name: np.zeros(leaf.shape, np.float32) if leaf.grad is None else leaf.grad.numpy()
            for name, leaf in self.torch.named_parameters()
        }
        made = {}
        for rule in qformer_table.rules(self.variant.qformer):
            if hasattr(rule, "target"):
                leaves = [rule.transform.forward(given[key]) for key in rule.keys]
                made[rule.target] = leaves[0] if rule.layers is None else np.stack(leaves)
        return made


def without_text(qformer: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a Q-Former that is not instruction-aware."""
    return {
        name: without_text(leaf) if isinstance(leaf, dict) else leaf
        for name, leaf in qformer.items()
        if not name.startswith(("text_", "position_"))
    }


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def batch(variant: Variant, seed: int = 0) -> dict[str, np.ndarray]:
    """Three samples of different lengths, to train on."""
    random = np.random.default_rng(seed)
    size = variant.vision.image_size
    t5 = variant.llm.kind == "t5"

    def rows(lengths, vocab):
        valid = np.arange(max(lengths)) < np.array(lengths)[:, None]
        return np.where(valid, random.integers(3, vocab, valid.shape), 0), valid

    vocab = min(variant.llm.vocab, 32_000) - 2  # below the image token
    made = {"images": random.integers(0, 256, (3, 1, size, size, 3), np.uint8)}
    made["qformer_tokens"], made["qformer_mask"] = rows((3, 9, 6), variant.qformer.vocab)
    made["tokens"], made["mask"] = rows((12, 7, 21), vocab)
    if t5:
        answer, valid = rows((4, 1, 6), vocab)
        made["targets"] = np.where(valid, answer, IGNORE)
        shifted = np.pad(answer, ((0, 0), (1, 0)))[:, :-1]
        made["decoder_tokens"] = np.where(shifted == IGNORE, 0, shifted)
    else:
        after = np.pad(made["tokens"], ((0, 0), (0, 1)))[:, 1:]
        asked = np.pad(made["mask"], ((0, 0), (0, 1)))[:, 1:] & (np.arange(21) >= 4)
        made["targets"] = np.where(asked, after, IGNORE)
    return lay_out(variant, made)


def layers(
    seen: dict[str, tuple[np.ndarray, np.ndarray]], name: str, step: int = 1, start: int = 0
):
    """Stacked inputs and outputs of every `step`-th recorded layer `name.{i}` from `start` on."""
    found = itertools.takewhile(lambda i: f"{name}.{i}" in seen, itertools.count(start, step))
    pairs = [seen[f"{name}.{i}"] for i in found]
    assert pairs, f"no layer {name}.{start} among {sorted(seen)}"
    return tuple(np.stack(part) for part in zip(*pairs, strict=True))
