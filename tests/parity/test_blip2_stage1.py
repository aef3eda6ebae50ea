"""BLIP-2's first stage beside the values of the original code, weights through the converter."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip import checkpoint
from jax_instructblip.conversion.engine import Rule
from jax_instructblip.conversion.lavis import lavis_entries
from jax_instructblip.data.captions import CaptionTokenizer
from jax_instructblip.models.blip2 import Blip2, image_to_text, text_to_image
from jax_instructblip.training.optimizer import decays
from jax_instructblip.training.pair_objective import PairObjective, pair_terms
from tests.helpers import golden, golden_blip2
from tests.helpers.golden_blip2 import assert_close

TOWER, LOSS, GRADIENT = 1e-4, 1e-5, 1e-4


@pytest.fixture(scope="module")
def variant(shared):
    return golden_blip2.variant()


@pytest.fixture(scope="module")
def model(variant):
    return Blip2(variant)


@pytest.fixture(scope="module")
def params(shared, tmp_path_factory):
    return golden_blip2.params(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def found(shared):
    return golden.outputs(golden_blip2.CASE)


@pytest.fixture(scope="module")
def given(shared):
    with np.load(golden.GOLDEN / golden_blip2.CASE / "inputs.npz") as file:
        return dict(file)


def batch(given, **fields):
    return {
        "images": jnp.asarray(golden.images()),
        "captions": jnp.asarray(given["text_ids"], jnp.int32),
        "caption_mask": jnp.asarray(given["text_mask"] > 0),
        "image_id": jnp.asarray(given["image_id"], jnp.int32),
        **fields,
    }


def test_features_of_images_and_texts(model, params, found, given):
    def features(model, batch):
        patches = model.encode_image(batch["images"][:, 0])
        hidden, kv = model.qformer.read_image(patches, return_kv=True)
        images, _ = model.image_features(patches)
        text = batch["captions"], batch["caption_mask"]
        read, texts = model.qformer.read_text(*text), model.text_features(*text)
        return patches, hidden, kv, images, read, texts

    patches, hidden, kv, images, read, texts = model.apply(
        {"params": params}, batch(given), method=features
    )
    assert_close(patches, found["vit/out"], TOWER)
    assert_close(hidden, found["qf/query_only"], TOWER)
    for name, leaf in (("k", "key"), ("v", "value")):
        past = found[f"qf/query_only/past0_{name}"].swapaxes(1, 2)
        assert_close(kv["cross"][leaf][0], past, TOWER)
    assert_close(images, found["train_frozen_vit/image_feats"], TOWER)
    valid = np.asarray(given["text_mask"] > 0)
    assert_close(read[valid], found["train_frozen_vit/bert_text_out"][valid], TOWER)
    assert_close(texts, found["train_frozen_vit/text_feats"], TOWER)
    assert_close(read[:, 0], found["forward_text"], TOWER)


def test_similarities(model, params, found, given):
    tag = "train_frozen_vit"
    images, texts = (jnp.asarray(found[f"{tag}/{kind}_feats"]) for kind in ("image", "text"))
    temp = params["heads"]["temp"]
    assert temp == found[f"{tag}/temp"]
    assert_close(image_to_text(images, texts) / temp, found[f"{tag}/sim_i2t"], TOWER)
    assert_close(text_to_image(texts, images) / temp, found[f"{tag}/sim_t2i"], TOWER)


CASES = {
    "train_frozen_vit": (False, ("qformer", "heads")),
    "train_image_id_797": (True, ("qformer", "heads")),
    "train_unfrozen_vit": (False, ("vision", "qformer", "heads")),
}


@pytest.mark.parametrize("tag", CASES)
def test_losses_and_gradients(model, params, found, given, tag):
    by_image, trained = CASES[tag]
    rows = batch(
        given,
        negative_images=jnp.asarray(found[f"{tag}/neg_image_for_text"], jnp.int32),
        negative_texts=jnp.asarray(found[f"{tag}/neg_text_for_image"], jnp.int32),
    )
    objective = PairObjective(model, by_image)
    totals = objective.totals(rows)

    def terms(trainable):
        sums = model.apply(
            {"params": params | trainable},
            rows,
            jax.random.key(0),
            by_image=by_image,
            train=False,
            method=pair_terms,
        )
        itm = sums["itm"] / (3 * totals["pairs"])
        return sums["itc"] / totals["pairs"], itm, sums["itg"] / totals["tokens"]

    @jax.jit
    def graded(trainable):
        values, pull = jax.vjp(terms, trainable)
        return values, [pull(tuple(row))[0] for row in jnp.eye(3)]

    values, gradients = graded({name: params[name] for name in trained})
    names = ("loss_itc", "loss_itm", "loss_lm")
    by_name = dict(zip(names, zip(values, gradients, strict=True), strict=True))
    by_name["loss"] = sum(values), jax.tree.map(lambda *each: sum(each), *gradients)
    for name, (value, gradient) in by_name.items():
        assert abs(value - found[f"{tag}/{name}"]) <= LOSS, name
        norms = groups(checkpoint.flatten(gradient))
        for group, wanted in found.items():
            prefix, _, own = group.rpartition("/")
            if prefix == f"{tag}/{name}/gradnorm":
                assert norms[own] == pytest.approx(float(wanted), rel=1e-4, abs=1e-6), group
    leaves = checkpoint.flatten(by_name["loss"][1])
    recorded = golden_blip2.gradients_like(found, f"{tag}/loss/grad/", leaves)
    assert len(recorded) == {"train_frozen_vit": 73, "train_unfrozen_vit": 4}.get(tag, 0)
    for path, wanted in recorded.items():
        assert_close(leaves[path], wanted, GRADIENT)


def groups(leaves):
    """Norms of gradients by the original's groups."""
    sums = dict.fromkeys(
        [
            *("query_tokens", "temp", "visual_encoder", "ln_vision", "Qformer"),
            *("vision_proj", "text_proj", "itm_head", "ALL"),
        ],
        0.0,
    )
    for path, leaf in leaves.items():
        square = float(jnp.square(leaf).sum())
        sums[group_of(path)] += square
        sums["ALL"] += square
    return {name: np.sqrt(value) for name, value in sums.items()}


def group_of(path):
    for start, group in (
        ("vision/", "visual_encoder"),
        ("qformer/queries", "query_tokens"),
        ("qformer/image_norm", "ln_vision"),
        ("heads/temp", "temp"),
        ("heads/image_projection", "vision_proj"),
        ("heads/text_projection", "text_proj"),
        ("heads/match", "itm_head"),
    ):
        if path.startswith(start):
            return group
    return "Qformer"  # its layers, and the head of captions


def test_the_same_weights_decay(shared, params):
    path = golden.GOLDEN / golden_blip2.CASE / "optimizer_groups.json"
    recorded = json.loads(path.read_text())["weight_decay_0.05_lr_scale_0.9_unfrozen_vit"]
    decayed = {name: each["weight_decay"] > 0 for each in recorded for name in each["params"]}
    ours = checkpoint.flatten(decays(params))
    compared = 0
    for entry in lavis_entries(golden_blip2.variant()):
        if isinstance(entry, Rule):
            for key in entry.keys:
                if key in decayed:
                    assert ours[entry.target] == decayed[key], key
                    compared += 1
    assert compared >= len(decayed) > 100


@pytest.fixture(scope="module")
def dist(shared):
    case = golden.GOLDEN / "blip2_stage1_dist"
    with np.load(case / "inputs.npz") as inputs, np.load(case / "outputs.npz") as outputs:
        return dict(inputs), dict(outputs)


@pytest.mark.parametrize("world", ["world1", "world2", "world1_nodetach_NOT_LAVIS"])
def test_the_contrast_of_a_gathered_batch(model, params, variant, dist, world):
    """Two processes of the original are one global batch here; what is gathered has no gradient."""
    given, wanted = dist
    bert = CaptionTokenizer.load(golden.GOLDEN / "tokenizers" / "bert", variant, limit=16)
    ids, valid, _ = bert.encode([str(each) for each in given["text_input"]])
    rows = {
        "images": jnp.asarray(given["image4"].transpose(0, 2, 3, 1)[:, None]),
        "captions": jnp.asarray(ids),
        "caption_mask": jnp.asarray(valid),
        "image_id": jnp.arange(4),
    }

    def contrast(trainable):
        variables = {"params": params | trainable}
        key = jax.random.key(0)
        return model.apply(variables, rows, key, train=False, method=pair_terms)["itc"] / 4

    trainable = {name: params[name] for name in ("qformer", "heads")}
    value, gradient = jax.jit(jax.value_and_grad(contrast))(trainable)
    assert value == pytest.approx(wanted[f"{world}/per_rank/loss_itc"].mean(), abs=LOSS)
    norms = groups(checkpoint.flatten(gradient))
    recorded = {
        name.rpartition("/")[2]: float(norm)
        for name, norm in wanted.items()
        if name.startswith(f"{world}/grad_itc/meangradnorm/")
    }
    same = [
        norms[name] == pytest.approx(norm, rel=1e-4, abs=1e-6) for name, norm in recorded.items()
    ]
    assert len(same) == 7
    assert all(same) if "nodetach" not in world else not all(same)
    if f"{world}/per_rank/sim_i2t" in wanted:
        features = lambda model: (
            model.image_features(model.encode_image(rows["images"][:, 0]))[0],
            model.text_features(rows["captions"], rows["caption_mask"]),
        )
        images, texts = model.apply({"params": params}, method=features)
        temp = params["heads"]["temp"]
        for name, found in (
            ("sim_i2t", image_to_text(images, texts)),
            ("sim_t2i", text_to_image(texts, images)),
        ):
            assert_close(found / temp, wanted[f"{world}/per_rank/{name}"].reshape(4, 4), TOWER)
