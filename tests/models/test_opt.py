import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip import checkpoint
from jax_instructblip.conversion.engine import make_plan
from jax_instructblip.conversion.tables import opt as table
from jax_instructblip.models.cache import expand_beams, reorder_beams
from jax_instructblip.models.layers import Scan
from jax_instructblip.models.masks import causal_mask
from jax_instructblip.models.opt import OFFSET, Opt
from jax_instructblip.models.released import get_variant
from jax_instructblip.models.vlm import is_unstacked, param_shapes, unstack_decoder
from tests.helpers.golden_blip2 import Recorded
from tests.helpers.numerics import error, random_params, small

VARIANT = small("opt")
CONFIG = VARIANT.llm
PARAMS = jax.tree.map(jnp.asarray, random_params(VARIANT)["llm"])
MODEL = Opt(CONFIG, jnp.float32)
DRAW = np.random.default_rng(0)
INPUTS = jnp.asarray(DRAW.standard_normal((3, 9, CONFIG.width), np.float32))
LENGTHS = (5, 9, 7)


def rows(inputs, valid, skip=0):
    """Arguments of a call for one sample a row, all slots but the first `skip` asked for."""
    index = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape[:2])
    return inputs, valid.astype(jnp.int32), index, index[:, skip:]


@functools.cache
def call(skip=0):
    return jax.jit(
        lambda inputs, valid: MODEL.apply({"params": PARAMS}, *rows(inputs, valid, skip))
    )


@jax.jit
def prefill(inputs, valid):
    return MODEL.apply({"params": PARAMS}, inputs, valid, 3, method="prefill")


@jax.jit
def step(token, cache):
    return MODEL.apply({"params": PARAMS}, token, cache, method="decode_step")


def valid(lengths, width):
    return jnp.arange(width)[None] < jnp.array(lengths)[:, None]


@pytest.fixture(scope="module")
def theirs():
    """The network of transformers with random weights, and those as our parameters."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    import transformers

    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=CONFIG.vocab,
        hidden_size=CONFIG.width,
        word_embed_proj_dim=CONFIG.width,
        num_hidden_layers=CONFIG.layers,
        num_attention_heads=CONFIG.heads,
        ffn_dim=CONFIG.mlp,
        max_position_embeddings=CONFIG.max_positions,
        init_std=0.2,
        attn_implementation="eager",
    )
    network = transformers.OPTForCausalLM(config).eval()
    for name, leaf in network.named_parameters():  # biases begin with 0, scales with 1
        if leaf.ndim == 1:
            leaf.data = 0.1 * torch.randn_like(leaf) + float("norm.weight" in name)
    tensors = {
        f"language_model.{name}": leaf.detach().numpy()
        for name, leaf in network.state_dict().items()
    }
    shapes = checkpoint.flatten({"llm": param_shapes(VARIANT)["llm"]})
    given = {name: Recorded(leaf) for name, leaf in tensors.items()}
    leaves = dict(make_plan(table.rules(CONFIG), given, shapes, "they do not fit"))
    params = checkpoint.unflatten({path: jnp.asarray(leaf) for path, leaf in leaves.items()})["llm"]
    return network, params


def test_layers_and_tower_are_those_of_transformers(theirs):
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    network, params = theirs
    mask = np.asarray(valid(LENGTHS, 9))
    with torch.no_grad():
        made = network(
            inputs_embeds=torch.tensor(np.asarray(INPUTS)),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            output_hidden_states=True,
        )

    def layer(index):
        """The output of layer `index` for the input that transformers gives its own."""
        stack = jax.tree.map(lambda leaf: leaf[index : index + 1], params["layers"])
        one = Opt(VARIANT.replace(**{"llm.layers": 1}).llm, jnp.float32)
        x = jnp.asarray(made.hidden_states[index].numpy())
        apply = lambda model: model.layers(x, None, causal, False, False)[0]
        return one.apply({"params": {**params, "layers": stack}}, method=apply)

    causal = causal_mask(jnp.asarray(mask, jnp.int32))
    for index in range(CONFIG.layers - 1):  # the last one comes back normed
        expected = made.hidden_states[index + 1].numpy()
        assert error(np.asarray(layer(index))[mask], expected[mask]) < 1e-5, index
    found = MODEL.apply({"params": params}, *rows(INPUTS, jnp.asarray(mask)))
    assert error(np.asarray(found)[mask], made.logits.numpy()[mask]) < 1e-4


def test_embedded_tokens_are_those_of_transformers(theirs):
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    network, params = theirs
    tokens = DRAW.integers(0, CONFIG.vocab, (2, 6))
    with torch.no_grad():
        expected = network(input_ids=torch.tensor(tokens)).logits.numpy()
    inputs = MODEL.apply({"params": params}, jnp.asarray(tokens), method="embed")
    found = MODEL.apply({"params": params}, *rows(inputs, jnp.ones((2, 6), bool)))
    assert error(found, expected) < 1e-4


def test_position_p_is_row_p_plus_2_of_the_table():
    embed = PARAMS["position_embed"]["embedding"]
    assert embed.shape == (CONFIG.max_positions + OFFSET, CONFIG.width)
    at = lambda positions: MODEL.apply(
        {"params": PARAMS}, jnp.zeros((1, 3, CONFIG.width)), jnp.array([positions]), method="begin"
    )
    last = CONFIG.max_positions - 1
    np.testing.assert_array_equal(at([0, 1, last])[0], embed[jnp.array([2, 3, last + 2])])
    assert jnp.isfinite(at([0, last + 1, last + 99])).all()  # padding beyond the table


def test_slots_that_nobody_asks_for_get_no_logits():
    whole = call()(INPUTS, valid(LENGTHS, 9))
    assert whole.shape == (3, 9, CONFIG.vocab) and whole.dtype == jnp.float32
    np.testing.assert_allclose(call(4)(INPUTS, valid(LENGTHS, 9)), whole[:, 4:], atol=1e-5)


def test_a_position_sees_nothing_after_it():
    whole = call()(INPUTS, valid((9, 9, 9), 9))
    changed = call()(INPUTS.at[:, 6:].add(INPUTS[:, :3]), valid((9, 9, 9), 9))
    assert error(changed[:, :6], whole[:, :6]) < 1e-6
    assert error(changed[:, 6:], whole[:, 6:]) > 1e-2


def test_padding_is_invisible():
    together = call()(INPUTS, valid(LENGTHS, 9))
    longer = jnp.pad(INPUTS, ((0, 0), (0, 4), (0, 0)), constant_values=3.0)
    longer = call()(longer, valid(LENGTHS, 13))
    for row, length in enumerate(LENGTHS):
        alone = call()(INPUTS[row : row + 1, :length], jnp.ones((1, length), bool))
        assert error(together[row, :length], alone[0]) < 1e-5
        assert error(longer[row, :length], alone[0]) < 1e-5


def test_samples_of_a_row_do_not_see_each_other():
    """Two samples in a row of their own order; each as if it were alone."""
    for first, second in ((2, 0), (1, 1)):
        a, b = LENGTHS[first], LENGTHS[second]
        inputs = jnp.concatenate([INPUTS[first, :a], INPUTS[second, :b], INPUTS[0, :2]])[None]
        segments = jnp.array([[1] * a + [2] * b + [0] * 2])
        positions = jnp.array([[*range(a), *range(b), 0, 0]])
        asked = jnp.arange(a + b)[None]
        found = MODEL.apply({"params": PARAMS}, inputs, segments, positions, asked)[0]
        alone = call()(INPUTS, valid(LENGTHS, 9))
        assert error(found[:a], alone[first, :a]) < 1e-5
        assert error(found[a:], alone[second, :b]) < 1e-5


def test_cached_steps_are_whole_rows():
    """Prefill and two steps at two padded lengths, with three rows of their own a sample."""
    tokens = jnp.asarray(DRAW.integers(0, CONFIG.vocab, (3, 3, 2)))  # [B, R, steps]
    embedding = PARAMS["embed"]["embedding"]
    for width in (9, 11):
        inputs = jnp.pad(INPUTS, ((0, 0), (0, width - 9), (0, 0)), constant_values=3.0)
        first, cache = prefill(inputs, valid(LENGTHS, width))
        assert first.shape == (3, 1, CONFIG.vocab)
        assert cache["prefix"]["key"].shape == (3, 3, CONFIG.heads, width, CONFIG.head_width)
        second, cache = step(tokens[..., 0], expand_beams(cache, 3))
        third, cache = step(tokens[..., 1], cache)
        assert cache["step"] == 2
        for b, r in ((0, 0), (1, 2), (2, 1)):
            row = jnp.concatenate([INPUTS[b, : LENGTHS[b]], embedding[tokens[b, r]]])[None]
            row = jnp.pad(row, ((0, 0), (0, 11 - row.shape[1]), (0, 0)))
            expected = call()(row, valid([LENGTHS[b] + 2], 11))[0, LENGTHS[b] - 1 :]
            found = jnp.stack([first[b, 0], second[b, r], third[b, r]])
            assert error(found, expected[:3]) < 1e-5


def test_a_tree_of_tokens_is_whole_rows():
    """The tree (7 (8 9) 5) behind prompts of several lengths, the prompt padded further."""
    tokens, depths = jnp.array([[7, 8, 9, 5]]), jnp.array([[1, 2, 3, 2]])
    ends = jnp.array([[4, 3, 3, 4]])
    inputs = jnp.pad(INPUTS, ((0, 0), (0, 2), (0, 0)), constant_values=3.0)
    _, cache = prefill(inputs, valid(LENGTHS, 11))

    def read(model, *tree):
        return model.logits(model.decode_tree(*tree))

    apply = jax.jit(lambda *tree: MODEL.apply({"params": PARAMS}, *tree, method=read))
    found = apply(tokens, depths, ends, cache)
    each = apply(*(jnp.tile(leaf, (3, 1)) for leaf in (tokens, depths, ends)), cache)
    np.testing.assert_allclose(each, found, rtol=0, atol=1e-5)
    embedding = PARAMS["embed"]["embedding"]
    for b, length in enumerate(LENGTHS):
        for line, at in (([7, 8, 9], [0, 1, 2]), ([7, 5], [0, 3])):
            row = jnp.concatenate([INPUTS[b, :length], embedding[jnp.array(line)]])[None]
            row = jnp.pad(row, ((0, 0), (0, 12 - row.shape[1]), (0, 0)))
            expected = call()(row, valid([length + len(line)], 12))[0, length : length + len(line)]
            assert error(found[b, jnp.array(at)], expected) < 1e-5


def test_layers_of_their_own_give_the_same_steps():
    params = {"llm": PARAMS}
    apart = unstack_decoder(VARIANT, params)
    assert is_unstacked(VARIANT, apart) and not is_unstacked(VARIANT, params)
    assert apart["llm"].keys() == PARAMS.keys()  # no head: the embedding is [V, D] already
    model = Opt(CONFIG, jnp.float32, Scan(unstacked=True))
    apply = functools.partial(model.apply, {"params": apart["llm"]})
    tokens = jnp.asarray(DRAW.integers(0, CONFIG.vocab, (3, 2, 2)))
    first, cache = prefill(INPUTS, valid(LENGTHS, 9))
    found, own = apply(INPUTS, valid(LENGTHS, 9), 3, method="prefill")
    assert isinstance(own["tail"], tuple) and error(found, first) < 1e-5
    cache, own = expand_beams(cache, 2), expand_beams(own, 2)
    for index in range(2):
        logits, cache = step(tokens[..., index], cache)
        found, own = apply(tokens[..., index], own, method="decode_step")
        assert error(found, logits) < 1e-5
        cache, own = (reorder_beams(each, jnp.array([[1, 0]] * 3)) for each in (cache, own))


def test_dropout_is_active_in_training_alone():
    given = rows(INPUTS, valid(LENGTHS, 9))
    still = call()(INPUTS, valid(LENGTHS, 9))
    draw = lambda model, key: model.apply(
        {"params": PARAMS}, *given, train=True, rngs={"dropout": jax.random.key(key)}
    )
    assert CONFIG.dropout == 0.1
    first, second = draw(MODEL, 0), draw(MODEL, 1)
    assert error(first, still) > 1e-2 and error(first, second) > 1e-2
    calm = Opt(VARIANT.replace(**{"llm.dropout": 0.0}).llm, jnp.float32)
    assert error(draw(calm, 0), still) < 1e-6


def test_bfloat16_computes_float32_logits():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    apply = jax.jit(Opt(CONFIG, jnp.bfloat16).apply)
    found = apply({"params": params}, *rows(INPUTS.astype(jnp.bfloat16), valid(LENGTHS, 9)))
    assert found.dtype == jnp.float32
    assert error(found, call()(INPUTS, valid(LENGTHS, 9))) < 0.1


@pytest.mark.parametrize(
    ("name", "count"), [("blip2-opt-2.7b", 2_651_596_800), ("blip2-opt-6.7b", 6_658_473_984)]
)
def test_released_sizes_of_the_language_model(name, count):
    shapes = param_shapes(get_variant(name))["llm"]
    assert "head" not in shapes  # it is the embedding
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
