"""Dot FLOPs of a train step: counted on its jaxpr, and by hand from the sizes of a variant.

One multiply-add is 2 FLOPs; matrix products and the patch convolution only. XLA's own count sees
the body of a scan once, so the jaxpr is walked instead: body times length.
"""

import math

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from jax_instructblip.models.variants import LlamaConfig, T5Config, Variant


def walk(jaxpr, times=1):
    """Yields (equation, how often it runs) for every product in `jaxpr`."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        assert name not in ("while", "cond"), f"{name}: its cost depends on the data"
        if name in ("dot_general", "conv_general_dilated"):
            yield equation, times
        inner = times * equation.params["length"] if name == "scan" else times
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if isinstance(part, ClosedJaxpr):
                    yield from walk(part.jaxpr, inner)
                elif isinstance(part, Jaxpr):
                    yield from walk(part, inner)


def flops_of(equation) -> int:
    left, right = (each.aval.shape for each in equation.invars[:2])
    out = equation.outvars[0].aval.shape
    if equation.primitive.name == "dot_general":
        (contract, _), _ = equation.params["dimension_numbers"]
        return 2 * math.prod(out) * math.prod(left[axis] for axis in contract)
    kernel = equation.params["dimension_numbers"].rhs_spec  # output features, input features, ...
    return 2 * math.prod(out) * math.prod(right) // right[kernel[0]]


def counted(function, *arguments) -> tuple[int, list[tuple[int, ...]]]:
    """FLOPs of all products of `function`, and the shapes of their results."""
    found = list(walk(jax.make_jaxpr(function)(*arguments).jaxpr))
    shapes = [equation.outvars[0].aval.shape for equation, _ in found]
    return sum(flops_of(equation) * times for equation, times in found), shapes


def linear(rows: int, *sizes: int) -> int:
    return 2 * rows * math.prod(sizes)


def analytic(variant: Variant, rows: int, text: int, tokens: int, answer: int = 0) -> int:
    """FLOPs of one step as the network is built: head on all T tokens, full attention.

    The ViT runs forward only; the Q-Former forward and backward, weights included; of the language
    model backward has the activations' half alone. `text` tokens for the Q-Former, `tokens` for
    the language model, `answer` for T5's decoder. Of the keys and values of the cross-attention
    only the weights' gradients are counted, as in the ideal; the step as built adds what the
    trained image norm before them asks for, under 1 % of the whole.
    """
    v, q = variant.vision, variant.qformer
    patches = v.tokens
    vision = linear(rows * (patches - 1), v.patch_size**2 * 3, v.width)
    vision += v.layers * (
        4 * linear(rows * patches, v.width, v.width)
        + 2 * linear(rows * patches, patches, v.width)
        + 2 * linear(rows * patches, v.width, v.mlp)
    )

    seen = q.queries + (text if q.instruction_aware else 0)
    pairs = q.layers // 2
    keys_values = pairs * 2 * linear(rows * patches, q.vision_width, q.width)
    qformer = keys_values + linear(rows * q.queries, q.width, q.llm_width)
    qformer += q.layers * (
        4 * linear(rows * seen, q.width, q.width)
        + 2 * linear(rows * seen, seen, q.width)
        + 2 * linear(rows * seen, q.width, q.mlp)
    )
    qformer += pairs * (
        2 * linear(rows * q.queries, q.width, q.width)
        + 2 * linear(rows * q.queries, patches, q.width)
    )
    return vision + 3 * qformer - keys_values + llm(variant.llm, rows, q.queries, tokens, answer)


def llm(config, rows: int, queries: int, tokens: int, answer: int) -> int:
    length = queries + tokens
    if isinstance(config, LlamaConfig):
        weights = config.layers * (4 * config.width**2 + 3 * config.width * config.mlp)
        attention = config.layers * 2 * linear(rows * length, length, config.width)
        head = linear(rows * tokens, config.width, config.vocab)
        # Backward: each weight once (dX); each product of the attention twice.
        return 2 * (linear(rows * length, weights) + head) + 3 * attention
    assert isinstance(config, T5Config)
    inner = config.heads * config.head_width
    own, mlp = 4 * config.width * inner, 3 * config.width * config.mlp
    encoder = linear(rows * length, config.encoder_layers * (own + mlp))
    decoder = linear(rows * answer, config.decoder_layers * (own + own // 2 + mlp))
    decoder += linear(rows * length, config.decoder_layers * own // 2)  # keys, values of encoder
    attention = config.encoder_layers * 2 * linear(rows * length, length, inner)
    attention += config.decoder_layers * 2 * linear(rows * answer, answer + length, inner)
    head = linear(rows * answer, config.width, config.vocab)
    return 2 * (encoder + decoder + head) + 3 * attention
