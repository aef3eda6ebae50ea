"""The side of transformers on PyTorch: its models in their fastest standard setting, and inputs.

Attention is SDPA. In training the weights that this package trains are trained, in float32, the
others are frozen; with bfloat16 it runs under autocast. AdamW is fused on a GPU.
"""

import contextlib
import math
import pathlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.workload import Questions, Sample, variant_of
from jax_instructblip.models.variants import IMAGE_MEAN, IMAGE_STD, Variant

TRAINED = ("qformer.", "query_tokens", "language_projection.", "vision_model.post_layernorm.")


def config_of(variant: Variant, dropout: float | None = None) -> transformers.InstructBlipConfig:
    """Returns transformers' config with the sizes of `variant`; `dropout` None: its default."""
    v, q, m = variant.vision, variant.qformer, variant.llm
    still: dict[str, Any] = {}
    if m.kind == "t5":
        text: dict[str, Any] = dict(
            model_type="t5",
            d_model=m.width,
            d_kv=m.head_width,
            d_ff=m.mlp,
            num_layers=m.encoder_layers,
            num_decoder_layers=m.decoder_layers,
            num_heads=m.heads,
            vocab_size=m.vocab,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    else:
        text = dict(
            model_type="llama",
            hidden_size=m.width,
            intermediate_size=m.mlp,
            num_hidden_layers=m.layers,
            num_attention_heads=m.heads,
            vocab_size=m.vocab,
            pad_token_id=m.pad_id,
            bos_token_id=m.bos_id,
            eos_token_id=m.eos_id,
        )
    if dropout is not None:
        still = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        text |= {"dropout_rate": dropout} if m.kind == "t5" else {"attention_dropout": dropout}
    return transformers.InstructBlipConfig(
        vision_config=dict(
            hidden_size=v.width,
            intermediate_size=v.mlp,
            num_hidden_layers=v.layers,
            num_attention_heads=v.heads,
            image_size=v.image_size,
            patch_size=v.patch_size,
        ),
        qformer_config=dict(
            hidden_size=q.width,
            intermediate_size=q.mlp,
            num_hidden_layers=q.layers,
            num_attention_heads=q.heads,
            vocab_size=q.vocab,
            encoder_hidden_size=v.width,
            **still,
        ),
        text_config=text,
        num_query_tokens=q.queries,
        image_token_index=image_id(variant),
    )


def image_id(variant: Variant) -> int:
    """Returns the id in place of a visual vector; no random text has it, nor is it padding."""
    return variant.llm.vocab - 2


def load(case: dict[str, Any]) -> transformers.InstructBlipForConditionalGeneration:
    """Returns the model of a case: that of its folder, else with random weights on the device.

    Of `case` the fields `variant`, `device`, `dtype` and, if there, `folder` are read.
    """
    if case["device"] == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("--device gpu, but torch has no GPU")
    dtype = getattr(torch, case["dtype"])
    model_class = transformers.InstructBlipForConditionalGeneration
    with quiet():
        if folder := case.get("folder"):
            return model_class.from_pretrained(
                folder, attn_implementation="sdpa", dtype=dtype
            ).eval()
        torch.manual_seed(0)
        config = config_of(variant_of(case["variant"]), 0.0)
        config._attn_implementation = "sdpa"
        torch.set_default_dtype(dtype)
        with torch.device(device()):
            model = model_class(config).eval()
        torch.set_default_dtype(torch.float32)
        return model


def write_folder(name: str, folder: pathlib.Path) -> None:
    """Writes variant `name` as a Hugging Face folder of random float32 weights of sane scale."""
    torch.manual_seed(0)
    with quiet():
        model = transformers.InstructBlipForConditionalGeneration(config_of(variant_of(name), 0.0))
        with torch.no_grad():
            for key, leaf in model.named_parameters():
                if leaf.ndim > 1:
                    embedded = "embed" in key or "token" in key or "shared" in key
                    leaf.normal_(0, 0.3 if embedded else 0.7 / math.sqrt(leaf[0].numel()))
        model.save_pretrained(folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses warnings and progress bars of transformers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def device() -> torch.device:
    """Returns the device to compute on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Waits until the device has finished all work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_peak() -> int:
    """Returns the peak bytes in use on the GPU."""
    return torch.cuda.max_memory_allocated()


def question_inputs(
    variant: Variant, asked: Questions, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Returns the inputs of questions without padding."""
    seen = np.full((len(asked.prompts), variant.visual_tokens), image_id(variant))
    tokens = np.concatenate([seen, asked.prompts], axis=1)
    return _on_device(
        {
            "pixel_values": _pixels(asked.images),
            "qformer_input_ids": asked.instructions,
            "qformer_attention_mask": np.ones_like(asked.instructions),
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
        },
        dtype,
    )


def training_inputs(
    variant: Variant, samples: Sequence[Sample], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Returns the inputs of samples, each text padded on its right to the batch's longest."""
    image = np.full(variant.visual_tokens, image_id(variant))
    if variant.llm.encoder_decoder:
        rows = [np.concatenate([image, each.prompt]) for each in samples]
        labels = [each.answer for each in samples]
    else:
        rows = [np.concatenate([image, each.prompt, each.answer]) for each in samples]
        labels = [
            np.concatenate([np.full(len(row) - len(each.answer), -100), each.answer])
            for row, each in zip(rows, samples, strict=True)
        ]
    texts = [each.instruction for each in samples]
    return _on_device(
        {
            "pixel_values": _pixels(np.stack([each.image for each in samples])),
            "qformer_input_ids": _padded(texts, 0),
            "qformer_attention_mask": _padded([np.ones_like(text) for text in texts], 0),
            "input_ids": _padded(rows, variant.llm.pad_id),
            "attention_mask": _padded([np.ones_like(row) for row in rows], 0),
            "labels": _padded(labels, -100),
        },
        dtype,
    )


def _padded(rows: Sequence[np.ndarray], value: int) -> np.ndarray:
    longest = max(map(len, rows))
    fill = lambda row: np.pad(row, (0, longest - len(row)), constant_values=value)
    return np.stack([fill(row) for row in rows])


def _pixels(images: np.ndarray) -> np.ndarray:
    """Returns normalised float32 pixels [B, 3, H, W]."""
    pixels = (images / 255 - IMAGE_MEAN) / IMAGE_STD
    return pixels.transpose(0, 3, 1, 2).astype(np.float32)


def _on_device(leaves: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    made = {}
    for name, leaf in leaves.items():
        kind = dtype if leaf.dtype == np.float32 else torch.long
        made[name] = torch.tensor(leaf, dtype=kind, device=device())
    return made
