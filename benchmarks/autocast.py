"""The PyTorch side of `precision.py`: transformers in float64 and under `torch.autocast(bfloat16)`.

Two ways to use autocast are measured:

    autocast   All weights are float32, as `torch.autocast` expects; each product casts its inputs.
               Embeddings are float32, and so are all residual streams.
    released   Weights of the language model and of the ViT's linear layers are bfloat16. LAVIS does
               the same, but with float16 in the ViT. The inputs of T5's encoder are float32, as in
               LAVIS, which joins a float16 and a bfloat16 array there, and so is its residual
               stream. The residual streams of T5's decoder and of LLaMA start from bfloat16
               embeddings and stay bfloat16.

LAVIS runs the ViT and the Q-Former in float16; here everything is bfloat16. On CPU, autocast
computes norms, softmaxes, sums and losses in bfloat16, on GPU in float32; here it is made to use
float32 as on GPU.
"""

import contextlib
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from benchmarks.theirs import TRAINED, config_of, image_id, quiet
from jax_instructblip.conversion.engine import Rule
from jax_instructblip.conversion.tables import qformer as qformer_table
from jax_instructblip.models.variants import IMAGE_MEAN, IMAGE_STD, Variant

RATE = 1e-5  # the paper's peak rate; its AdamW has betas 0.9, 0.999 and weight decay 0.05
_SHARPENED = (".q.weight", "q_proj.weight", "query.weight", "lm_head.weight")
# The functions used by these models that CUDA's autocast computes in float32.
_WIDE = {
    *(functional.layer_norm, functional.softmax, functional.log_softmax, functional.cross_entropy),
    *(torch.softmax, torch.Tensor.softmax, torch.pow, torch.Tensor.pow),
    *(torch.rsqrt, torch.Tensor.rsqrt, torch.sum, torch.Tensor.sum),
}


class Widened(TorchFunctionMode):
    """Makes CPU autocast compute the functions in `_WIDE` in float32, as GPU autocast does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Calls `func`, of `_WIDE` with float32 in place of bfloat16 arguments."""
        narrow = lambda leaf: isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bfloat16
        if func in _WIDE:
            args = tuple(leaf.float() if narrow(leaf) else leaf for leaf in args)
        return func(*args, **(kwargs or {}))


class Double(TorchFunctionMode):
    """Turns casts to float32 in transformers' norms and softmaxes into casts to float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Calls `func` with float64 in place of float32 among its arguments."""
        change = lambda leaf: torch.float64 if leaf is torch.float32 else leaf
        args = tuple(change(leaf) for leaf in args)
        kwargs = {key: change(leaf) for key, leaf in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


@contextlib.contextmanager
def computing(side: str):
    """Makes transformers compute in float64 inside if `side` is "float64", else by autocast."""
    if side == "float64":
        with Double():
            yield
        return
    with torch.autocast("cpu", dtype=torch.bfloat16), Widened():
        yield


def make_weights(
    variant: Variant, sharp: float, seed: int, folder: pathlib.Path
) -> dict[str, np.ndarray]:
    """Writes a Hugging Face folder of random weights; returns the trained ones by our leaf paths.

    `sharp` multiplies query and head kernels; above 1 the softmaxes are more peaked. Frozen weights
    are rounded to bfloat16.
    """
    with quiet():
        model = transformers.InstructBlipForConditionalGeneration(config_of(variant))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, leaf in model.named_parameters():
            leaf.normal_(generator=draw)
            if leaf.ndim == 1:
                leaf.mul_(0.1).add_(0.0 if key.endswith("bias") else 1.0)
            else:
                embedded = "embed" in key or "token" in key or "shared" in key
                leaf.mul_(0.3 if embedded else 0.7 / math.sqrt(leaf[0].numel()))
            if key.endswith(_SHARPENED):
                leaf.mul_(sharp)
            if key.endswith(".q.weight"):  # T5 does not scale its scores: its queries are smaller
                leaf.mul_(variant.llm.head_width**-0.5)
            if key.endswith("qkv.bias"):
                leaf.chunk(3)[1].zero_()  # the ViT has no key bias
            if not key.startswith(TRAINED):
                leaf.copy_(leaf.bfloat16())
    with quiet():
        model.save_pretrained(folder)
    return by_our_paths(variant, dict(model.named_parameters()))


def measure(
    variant: Variant,
    side: str,
    folder: pathlib.Path,
    batches: Sequence[dict[str, np.ndarray]],
    steps: int,
) -> dict[str, np.ndarray]:
    """Runs transformers as `side`, one of `precision.SIDES`; returns arrays by name.

    `folder` has the weights (`make_weights`); `batches` are those of `precision.question_ids`, one
    for each of `steps`, at least one. The arrays are described in `precision.measure`.
    """
    with quiet():
        model = transformers.InstructBlipForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()  # no dropout
    if side == "float64":
        model.double()
    elif side == "released":
        _narrow(model)
    trained = {key: leaf for key, leaf in model.named_parameters() if key.startswith(TRAINED)}
    model.requires_grad_(False)
    for leaf in trained.values():
        leaf.requires_grad_(True)
    decayed = [leaf for leaf in trained.values() if leaf.ndim > 1]
    others = [leaf for leaf in trained.values() if leaf.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, RATE)

    def call(number: int) -> Any:
        with computing(side):
            return model(**_inputs(variant, batches[number], side))

    @torch.no_grad()
    def read() -> np.ndarray:
        answer = batches[0]["answer"].shape[1]
        logits = call(0).logits
        # For a decoder-only model: the logits one position before each answer token.
        asked = logits if variant.llm.kind == "t5" else logits[:, -answer - 1 : -1]
        return asked.double().numpy()

    found, losses = {"logits": read()}, []
    for number in range(steps):
        loss = call(number).loss
        losses.append(loss.item())
        loss.backward()
        if number == 0:
            zero = lambda leaf: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            gradient = by_our_paths(variant, {key: zero(leaf) for key, leaf in trained.items()})
            found |= {f"gradient:{path}": leaf for path, leaf in gradient.items()}
        optimizer.step()
        optimizer.zero_grad()
    if steps:
        after = by_our_paths(variant, trained)
        found |= {f"after:{path}": leaf for path, leaf in after.items()}
        found |= {"losses": np.array(losses), "logits_after": read()}
    return found


def by_our_paths(variant: Variant, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Returns the trained ones of `tensors`, by PyTorch's names, as arrays by our leaf paths."""
    made = {}
    for rule in qformer_table.rules(variant.qformer):
        if isinstance(rule, Rule):
            arrays = [tensors[key].detach().double().numpy() for key in rule.keys]
            leaves = [rule.transform.forward(array) for array in arrays]
            made[rule.target] = leaves[0].copy() if rule.layers is None else np.stack(leaves)
    return made


def _narrow(model: Any) -> None:
    """Casts the weights that LAVIS narrows to bfloat16, and T5's encoder inputs to float32."""
    model.language_model.bfloat16()
    for module in model.vision_model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.bfloat16()

    def widen(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"].float()}

    if model.config.text_config.is_encoder_decoder:
        model.language_model.encoder.register_forward_pre_hook(widen, with_kwargs=True)


def _inputs(variant: Variant, ids: dict[str, np.ndarray], side: str) -> dict[str, torch.Tensor]:
    """Returns a batch for transformers: image placeholders, text, labels, pixels."""
    prompt, answer = ids["prompt"], ids["answer"]
    pixels = (ids["images"][:, 0] / 255 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    image = np.full((len(prompt), variant.qformer.queries), image_id(variant))
    row, labels = [image, prompt], answer
    if variant.llm.kind == "llama":
        unasked = np.full((len(prompt), image.shape[1] + prompt.shape[1]), -100)
        row, labels = [*row, answer], np.concatenate([unasked, answer], axis=1)
    given = {
        "qformer_input_ids": ids["instruction"],
        "qformer_attention_mask": np.ones_like(ids["instruction"]),
        "input_ids": np.concatenate(row, axis=1),
        "labels": labels,
    }
    given["attention_mask"] = np.ones_like(given["input_ids"])
    made = {key: torch.tensor(leaf, dtype=torch.long) for key, leaf in given.items()}
    made["pixel_values"] = torch.tensor(pixels.transpose(0, 3, 1, 2)).to(
        torch.float64 if side == "float64" else torch.float32
    )
    return made
