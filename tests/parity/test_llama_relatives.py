"""LLaMA and its relatives against transformers: whole rows, answers, candidate trees, folders."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip import checkpoint
from jax_instructblip.conversion.families import LANGUAGES, language_type
from jax_instructblip.conversion.language_folder import open_language
from jax_instructblip.models.dense import kernel_by_word
from jax_instructblip.models.layers import Scan, unstack_layers
from jax_instructblip.models.llama import Llama
from tests.helpers.language_folders import enliven, write_language
from tests.helpers.numerics import error

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")

NEW, LENGTHS = 8, (3, 9, 40, 17)
KINDS = ("llama", "llama_linear", "llama3", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """The network of transformers, and our model with parameters from the same folder."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = write_language(folder, request.param).eval()
    enliven(theirs, folder)
    ours = open_language(folder)
    params = checkpoint.unflatten({path: jnp.asarray(leaf) for path, leaf in ours})["llm"]
    model = Llama(ours.config, jnp.float32)

    @jax.jit
    def embed(tokens):
        return model.apply({"params": params}, tokens, method="embed")

    @jax.jit
    def whole(tokens, valid):
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model.apply({"params": params}, embed(tokens), valid.astype(jnp.int32), index, index)

    @jax.jit
    def prefill(tokens, valid):
        return model.apply({"params": params}, embed(tokens), valid, NEW, method="prefill")

    @jax.jit
    def step(token, cache):
        return model.apply({"params": params}, token, cache, method="decode_step")

    return types.SimpleNamespace(
        kind=request.param,
        theirs=theirs,
        words=theirs.config.vocab_size,  # a row for a padding token may have been added
        config=ours.config,
        model=model,
        params=params,
        whole=whole,
        prefill=prefill,
        step=step,
    )


def draw(config, rows, width, seed=0):
    """Random ids of several lengths, padded at the end, and the mask of those that are valid."""
    rng = np.random.default_rng(seed)
    lengths = np.resize(LENGTHS, rows) if rows == len(LENGTHS) else rng.integers(2, width, rows)
    valid = np.arange(width) < lengths[:, None]
    return np.where(valid, rng.integers(3, config.vocab - 3, (rows, width)), 0), valid


def their_logits(theirs, tokens, **more):
    with torch.no_grad():
        return theirs(torch.tensor(tokens), **more).logits.numpy()


def test_logits_padded_or_not(pair):
    tokens, valid = draw(pair.config, len(LENGTHS), max(LENGTHS))
    found = np.asarray(pair.whole(tokens, jnp.asarray(valid)))[..., : pair.words]
    mask = torch.tensor(valid.astype(np.int64))
    padded = their_logits(pair.theirs, tokens, attention_mask=mask)
    assert error(found[valid], padded[valid]) < 1e-4
    for row, length in enumerate(LENGTHS):
        alone = their_logits(pair.theirs, tokens[row : row + 1, :length])[0]
        assert error(found[row, :length], alone) < 1e-4


def test_greedy_tokens_of_twenty_prompts(pair):
    tokens, valid = draw(pair.config, 20, 24)
    logits, cache = pair.prefill(tokens, jnp.asarray(valid))
    heads, width = pair.config.cached_heads, pair.config.head_width
    assert cache["prefix"]["key"].shape == (pair.config.layers, 20, heads, 24, width)
    found = [np.asarray(logits).argmax(-1)]
    for _ in range(NEW - 1):
        logits, cache = pair.step(jnp.asarray(found[-1]), cache)
        found.append(np.asarray(logits).argmax(-1))
    pair.theirs.generation_config.eos_token_id = None
    for row, answer in enumerate(np.concatenate(found, axis=1)):
        prompt = torch.tensor(tokens[row, valid[row]])[None]
        with torch.no_grad():
            made = pair.theirs.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
            )
        assert answer.tolist() == made[0, prompt.shape[1] :].tolist()
    assert len(set(np.concatenate(found, axis=1).ravel().tolist())) > 10


def test_a_tree_of_candidates(pair):
    """The tree (7 (8 9) 5) behind prompts of several lengths."""
    tokens, valid = draw(pair.config, len(LENGTHS), max(LENGTHS))
    _, cache = pair.prefill(tokens, jnp.asarray(valid))

    def read(model, *tree):
        return model.logits(model.decode_tree(*tree))

    tree = (jnp.array(each)[None] for each in ([7, 8, 9, 5], [1, 2, 3, 2], [4, 3, 3, 4]))
    found = np.asarray(pair.model.apply({"params": pair.params}, *tree, cache, method=read))
    found = found[..., : pair.words]
    for row, length in enumerate(LENGTHS):
        for line, at in (([7, 8, 9], [0, 1, 2]), ([7, 5], [0, 3])):
            whole = np.concatenate([tokens[row, :length], line])[None]
            expected = their_logits(pair.theirs, whole)[0, length:]
            assert error(found[row, at], expected) < 1e-4


def test_layers_apart_answer_alike(pair):
    """A tail written before it is read, several rows a sample, and a head of words."""
    params = {**pair.params, "layers": unstack_layers(pair.params["layers"])}
    if not pair.config.tied_head:
        params["head"] = {"kernel": kernel_by_word(jnp.asarray(params["head"]["kernel"]))}
    model = Llama(pair.config, jnp.float32, Scan(unstacked=True))
    tokens, valid = draw(pair.config, len(LENGTHS), max(LENGTHS))
    valid = jnp.asarray(valid)
    apply = lambda method, *args: model.apply({"params": params}, *args, method=method)
    first, cache = apply("prefill", apply("embed", jnp.asarray(tokens)), valid, NEW)
    second, _ = apply("decode_step", jnp.full((len(LENGTHS), 1), 7), cache)
    expected, cache = pair.prefill(tokens, valid)
    assert error(first, expected) < 1e-5
    assert error(second, pair.step(jnp.full((len(LENGTHS), 1), 7), cache)[0]) < 1e-5


def test_the_fields_that_a_folder_sets(pair):
    config, kind = pair.config, pair.kind
    assert (config.cached_heads < config.heads) == (kind not in ("llama", "llama_linear"))
    assert config.key_bias == (kind == "qwen2") and config.key_norm == (kind == "qwen3")
    assert config.tied_head == (kind == "qwen2") == ("head" not in pair.params)
    assert config.head_size == (12 if kind == "qwen3" else 0)
    scaling = {"llama3": "llama3", "llama_linear": "linear"}
    assert config.rope_scaling == scaling.get(kind, "none")
    assert config.longest_sample == (100 if kind == "mistral" else 128)


def test_a_config_that_is_written_is_read_again(pair):
    named = language_type(pair.config)
    assert named == pair.kind.replace("llama3", "llama").replace("llama_linear", "llama")
    section = LANGUAGES[named].section
    fields, wrong = section.read({"text_config": section.write(pair.config)})
    own = {f"{name}_id": getattr(pair.config, f"{name}_id") for name in ("bos", "eos", "pad")}
    assert not wrong and LANGUAGES[named].config(**fields, **own) == pair.config
