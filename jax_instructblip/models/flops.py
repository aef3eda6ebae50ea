"""FLOPs of matrix products: counted on a jaxpr, or computed from the sizes of a variant.

One multiply-add is 2 FLOPs. Only matrix products and the patch convolution count. XLA's own count
includes the body of a scan once, so the jaxpr is walked instead: body times length.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from jax_instructblip.models.variants import (
    LanguageConfig,
    LlamaConfig,
    OptConfig,
    ProjectorConfig,
    T5Config,
    Variant,
)

Count = Any  # an int, or an array with a number for each sample (`useful`)
PRODUCTS = ("dot_general", "conv_general_dilated")
# cuDNN's attention, with the number of its products: of scores and values; those of the gradients
# of both, and of the scores again.
FUSED = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def products(jaxpr: Jaxpr, times: int = 1, loops: int = 1) -> Iterator[tuple[Any, int]]:
    """Yields (equation, number of runs) of each matrix product and convolution of `jaxpr`.

    `times` is how often `jaxpr` itself runs, `loops` how often the body of a `while` is assumed to
    run. Of the branches of a `cond` only the last counts, which is that of a CPU
    (`jax.lax.platform_dependent`). A train step has neither `while` nor `cond`.
    """
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in PRODUCTS or name in FUSED:
            yield equation, times
        inner = times * (equation.params["length"] if name == "scan" else 1)
        inner *= loops if name == "while" else 1
        for value in equation.params.values():
            parts = value if isinstance(value, tuple | list) else (value,)
            for part in parts[-1:] if name == "cond" else parts:
                if isinstance(part, ClosedJaxpr):
                    yield from products(part.jaxpr, inner, loops)
                elif isinstance(part, Jaxpr):
                    yield from products(part, inner, loops)


def flops_of(equation: Any) -> int:
    """FLOPs of one run of a product, an equation that `products` yields."""
    left, right = (each.aval.shape for each in equation.invars[:2])
    out = equation.outvars[0].aval.shape
    if number := FUSED.get(equation.primitive.name):
        return number * 2 * math.prod(left) * right[1]  # [B, T, N, K] and the S keys
    if equation.primitive.name == "dot_general":
        (contract, _), _ = equation.params["dimension_numbers"]
        return 2 * math.prod(out) * math.prod(left[axis] for axis in contract)
    kernel = equation.params["dimension_numbers"].rhs_spec  # output features, input features, ...
    return 2 * math.prod(out) * math.prod(right) // right[kernel[0]]


def count(jaxpr: Jaxpr, loops: int = 1) -> int:
    """FLOPs of all products of `jaxpr`; each `while` body is assumed to run `loops` times."""
    return sum(flops_of(equation) * times for equation, times in products(jaxpr, loops=loops))


def counted(function: Callable[..., Any], *arguments: Any) -> tuple[int, list[tuple[int, ...]]]:
    """FLOPs of all products of `function(*arguments)`, and the shape of each product's result."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    shapes = [equation.outvars[0].aval.shape for equation, _ in products(jaxpr)]
    return count(jaxpr), shapes


def analytic(
    variant: Variant,
    batch: int,
    text: int,
    tokens: int,
    answer: int,
    *,
    samples_per_row: int = 1,
    row_slots: int = 0,
    row_targets: int = 0,
    trains_vision: bool = False,
    trains_llm: bool = False,
    patches: bool = False,
) -> int:
    """FLOPs of one train step: the bridge trained, ViT and language model frozen unless said so.

    Each of the `batch` samples has one image, `text` tokens for the Q-Former, `tokens` for the
    language model (without the visual vectors, which are added; T5: of the encoder) and `answer`
    targets; `samples_per_row` samples are packed into one row. Attention counts whole rows, the
    head all targets. `row_slots` (visual vectors included) and `row_targets` are the widths of a
    row; 0 stands for those of its samples together.

    The ViT runs forward only, unless `trains_vision`; the bridge forward and backward, with
    gradients of its weights; the language model forward and backward, with them if `trains_llm`.
    Before a frozen ViT, in the backward pass of the products that read its patches, only the
    weights' gradients count. The gradient for the trained image norm before them is left out, under
    1 % of the whole. With `patches` the batch has patch features, and the ViT does not run.
    """
    first, bridge = _bridge(variant, batch, text)
    width = row_slots or samples_per_row * (variant.visual_tokens + tokens)
    rows, answers = batch // samples_per_row, row_targets or samples_per_row * answer
    language = _language(variant.llm, rows, width, answers)
    towers = {"vision": trains_vision, variant.bridge.key: True, "llm": trains_llm}
    trained = [name for name, trains in towers.items() if trains]
    return _step(trained, _vision(variant, 0 if patches else batch), (first, bridge), language)


def useful(
    variant: Variant, sizes: np.ndarray, trainable: Sequence[str], *, patches: bool = False
) -> int:
    """FLOPs that one train step needs: every sample alone in its row, nothing padded.

    `sizes` [samples, 4] holds the images, instruction ids, slots (visual vectors included) and
    targets of each sample (`data.batch.sample_sizes`), or means of them; `trainable` names the
    top-level trees that are trained. Captions of BLIP-2's first stage all count as long as their
    mean. With `patches` the batch has patch features, and the ViT does not run.
    """
    images, text, slots, targets = np.asarray(sizes, np.float64).T
    if variant.llm is None:
        mean = round(float(text.mean()))
        return pairs(variant, len(text), mean, trains_vision="vision" in trainable)
    _, own = _bridge(variant, images, text)
    first, _ = _bridge(variant, int(images.sum()), 0)
    language = _language(variant.llm, 1, slots, targets)
    total = lambda counts: int(np.sum(counts))
    return _step(
        trainable,
        _vision(variant, 0 if patches else int(images.sum())),
        (first, total(own)),
        (total(language[0]), total(language[1])),
    )


def _step(
    trainable: Sequence[str],
    vision: tuple[int, int],
    bridge: tuple[int, int],
    language: tuple[int, int],
) -> int:
    """FLOPs of one train step, from the towers' forward FLOPs.

    `vision` and `bridge` are (products that need no gradient of their input if what comes before is
    frozen, everything), `language` is (products with weights, products inside attention). A tower
    runs backward if it or one before it is trained; a frozen one has no gradients of weights.
    """
    (patches, seen), (first, read), (forward, attention) = vision, bridge, language
    trains_vision, trains_llm = "vision" in trainable, "llm" in trainable
    trains_bridge = bool({"qformer", "projector"} & set(trainable))
    total = 3 * seen - patches if trains_vision else seen  # the pixels have no gradient
    if trains_bridge:
        total += 3 * read - (0 if trains_vision else first)
    else:
        total += (2 if trains_vision else 1) * read
    return total + (3 if trains_llm else 2) * forward + 3 * attention


def pairs(variant: Variant, batch: int, text: int, *, trains_vision: bool = False) -> int:
    """FLOPs of one train step of BLIP-2's first stage on `batch` pairs with `text` ids a caption.

    The Q-Former reads each image alone and each caption alone (ITC), three pairs per sample (ITM),
    and each caption after the queries (ITG). An image's cross-attention keys and values count once
    for all of these. Similarities are of all pairs of the batch.
    """
    q = variant.qformer
    keys_values = q.layers // 2 * 2 * linear(batch * variant.vision.tokens, q.vision_width, q.width)
    read = _qformer_rows(variant, batch, q.queries, q.queries, q.queries)
    read += _qformer_rows(variant, batch, text, text)
    read += _qformer_rows(variant, 3 * batch, q.queries + text, q.queries + text, q.queries)
    read += _qformer_rows(variant, batch, text, q.queries + text)
    head = linear(batch * text, q.width, q.width + q.vocab)
    read += head + linear(batch * (q.queries + 1), q.width, q.feature_width)
    read += linear(3 * batch * q.queries, q.width, 2)
    similarities = linear(batch * q.queries, batch, q.feature_width)
    # Both similarities have a gradient for their own side alone: two products of each.
    forward = 3 * (read + keys_values) + 2 * 2 * similarities
    patches, vision = _vision(variant, batch)
    return forward + (3 * vision - patches if trains_vision else vision - keys_values)


def generation(variant: Variant, rows: int, text: int, tokens: int, new: int) -> int:
    """FLOPs of generating `new` tokens for each of `rows` prompts with one image each.

    A prompt has `text` tokens for the Q-Former (0 if it reads none) and `tokens` for the language
    model, without the visual vectors, which are added. In a decoder-only model the prompt's pass
    also gives the first new token. Attention in every later step is counted over the prompt and all
    slots that are reserved for new tokens.
    """
    config, queries = variant.llm, variant.visual_tokens
    prompt = queries + tokens
    head = linear(rows, config.width, config.vocab)
    read = _vision(variant, rows)[1] + _bridge(variant, rows, text)[1]
    if not isinstance(config, T5Config):
        weights = _decoder_weights(config)
        inner = config.heads * config.head_width
        attention = lambda keys: config.layers * 2 * linear(rows, keys, inner)
        read += linear(rows * prompt, weights) + prompt * attention(prompt) + head
        return read + (new - 1) * (linear(rows, weights) + attention(prompt + new - 1) + head)
    inner = config.heads * config.head_width
    own, mlp = 4 * config.width * inner, 3 * config.width * config.mlp
    read += config.encoder_layers * (
        linear(rows * prompt, own + mlp) + 2 * linear(rows * prompt, prompt, inner)
    )
    read += config.decoder_layers * linear(rows * prompt, own // 2)  # keys, values for the decoder
    step = config.decoder_layers * (
        linear(rows, own + own // 2 + mlp) + 2 * linear(rows, prompt + new, inner)
    )
    return read + new * (step + head)


def _decoder_weights(config: LlamaConfig | OptConfig) -> int:
    """The number of kernel elements in all layers of a decoder; LLaMA's have a gate, too."""
    gated = isinstance(config, LlamaConfig)
    mlp = (3 if gated else 2) * config.width * config.mlp
    heads = 2 * config.heads + 2 * (config.cached_heads if gated else config.heads)
    return config.layers * (config.width * heads * config.head_width + mlp)


def linear(rows: Count, *sizes: Count) -> Count:
    """FLOPs of multiplying `rows` vectors with a weight of shape `sizes`.

    Each may be an array with a number for each sample, as is then the result.
    """
    return 2 * rows * math.prod(sizes)


def _vision(variant: Variant, rows: int) -> tuple[int, int]:
    """FLOPs of the forward pass: of the patch convolution, and of everything."""
    v = variant.vision
    patches = linear(rows * (v.tokens - 1), v.patch_size**2 * 3, v.width)
    return patches, patches + v.computed_layers * (
        4 * linear(rows * v.tokens, v.width, v.width)
        + 2 * linear(rows * v.tokens, v.tokens, v.width)
        + 2 * linear(rows * v.tokens, v.width, v.mlp)
    )


def _qformer_rows(
    variant: Variant, rows: Count, own: Count, seen: Count, queries: int = 0
) -> Count:
    """Forward FLOPs of rows of `own` tokens, `queries` of them, that attend to `seen` tokens.

    Without the keys and values of the image.
    """
    q = variant.qformer
    each = 4 * linear(rows * own, q.width, q.width) + 2 * linear(rows * own, q.width, q.mlp)
    each += 2 * linear(rows * own, seen, q.width)
    cross = 2 * linear(rows * queries, q.width, q.width)
    cross += 2 * linear(rows * queries, variant.vision.tokens, q.width)
    return q.layers * each + q.layers // 2 * cross


def _bridge(variant: Variant, rows: Count, text: Count) -> tuple[Count, Count]:
    """FLOPs of the bridge's forward pass: (products that read the patches alone, everything).

    In a Q-Former the former are the keys and values of the cross-attention.
    """
    if isinstance(variant.bridge, ProjectorConfig):
        p, vectors = variant.bridge, rows * variant.visual_tokens
        first = linear(vectors, p.vision_width, p.llm_width)
        return first, first + (p.layers - 1) * linear(vectors, p.llm_width, p.llm_width)
    q, patches = variant.qformer, variant.vision.tokens
    seen = q.queries + (text if q.instruction_aware else 0)
    keys_values = q.layers // 2 * 2 * linear(rows * patches, q.vision_width, q.width)
    forward = keys_values + linear(rows * q.queries, q.width, q.llm_width)
    forward += _qformer_rows(variant, rows, seen, seen, q.queries)
    return keys_values, forward


def _language(
    config: LanguageConfig, rows: int, length: Count, answer: Count
) -> tuple[Count, Count]:
    """A language model's forward FLOPs: (products with weights, products inside attention)."""
    if not isinstance(config, T5Config):
        weights = _decoder_weights(config)
        inner = config.heads * config.head_width
        attention = config.layers * 2 * linear(rows * length, length, inner)
        head = linear(rows * answer, config.width, config.vocab)
        return linear(rows * length, weights) + head, attention
    inner = config.heads * config.head_width
    own, mlp = 4 * config.width * inner, 3 * config.width * config.mlp
    encoder = linear(rows * length, config.encoder_layers * (own + mlp))
    decoder = linear(rows * answer, config.decoder_layers * (own + own // 2 + mlp))
    decoder += linear(rows * length, config.decoder_layers * own // 2)  # keys, values of encoder
    attention = config.encoder_layers * 2 * linear(rows * length, length, inner)
    attention += config.decoder_layers * 2 * linear(rows * answer, answer + length, inner)
    head = linear(rows * answer, config.width, config.vocab)
    return encoder + decoder + head, attention
