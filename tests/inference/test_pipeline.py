import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jax_instructblip
from jax_instructblip import checkpoint
from jax_instructblip.data.batch import IGNORE, collate
from jax_instructblip.inference.batching import compacted, make_batches, pair_inputs
from jax_instructblip.inference.loading import resolve_checkpoint
from jax_instructblip.inference.pipeline import Answer, InstructBlipPipeline
from tests.helpers.compile_counter import count_compiles
from tests.helpers.interpreter import run_python
from tests.helpers.rows import scattered
from tests.helpers.small_checkpoint import KINDS, write_checkpoint

NEW = 12  # tokens of an answer
PROMPTS = [
    "What color is the dog?",
    "Describe the picture in detail.",
    "Question: how many birds are in the image? Short answer:",
    "Why?",
    "Is there a cat on the table, or a dog on the river, or two birds in the small tree? Answer:",
]


@pytest.fixture(scope="module")
def folders(shared, tmp_path_factory):
    return {
        kind: write_checkpoint(tmp_path_factory.mktemp("checkpoints") / kind, kind, shared)
        for kind in KINDS
    }


@pytest.fixture(scope="module", params=KINDS)
def blip(request, folders):
    return jax_instructblip.load(folders[request.param])


@pytest.fixture(scope="module")
def t5(folders):
    return jax_instructblip.load(folders["t5"])


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (40 + 9 * i, 70, 3), np.uint8) for i in range(count)]


@pytest.fixture(scope="module")
def answers(blip):
    return blip.generate(images(5), PROMPTS, max_new_tokens=NEW)


def assert_same(found, expected):
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    assert [answer.text for answer in found] == [answer.text for answer in expected]
    np.testing.assert_allclose(
        [answer.logprob for answer in found],
        [answer.logprob for answer in expected],
        rtol=0,
        atol=1e-4,
    )


def test_answers(blip, answers):
    llm = blip.variant.llm
    assert len(answers) == 5 and len({answer.tokens for answer in answers}) > 1
    for answer in answers:
        assert isinstance(answer, Answer)
        assert answer.text == blip.text.decode(answer.tokens)
        assert 1 <= len(answer.tokens) <= NEW and llm.eos_id not in answer.tokens[:-1]
        assert len(answer.tokens) == NEW or answer.tokens[-1] == llm.eos_id
        assert answer.logprob < 0


def test_an_answer_does_not_depend_on_its_neighbours_or_on_the_batch_size(blip, answers):
    assert_same(blip.generate(images(5), PROMPTS, max_new_tokens=NEW, batch_size=3), answers)


def test_a_draw_depends_on_the_seed_and_on_the_place_alone(t5):
    sample = {"max_new_tokens": NEW, "temperature": 1.0, "top_p": 0.9}
    draw = lambda seed, size: t5.generate(images(5), PROMPTS, seed=seed, batch_size=size, **sample)
    expected = draw(3, 8)
    assert_same(draw(3, 3), expected)
    assert [answer.tokens for answer in draw(4, 8)] != [answer.tokens for answer in expected]


@pytest.mark.parametrize("frames", [1, 2])
def test_one_image_of_many_prompts_is_looked_at_once(t5, frames):
    video = images(frames)
    shared = list(make_batches(t5.text, pair_inputs([video], PROMPTS), 4))
    assert [part.batch["images"].shape[:2] for part in shared] == [(1, frames)] * 2
    assert [len(part.batch["tokens"]) for part in shared] == [4, 4]
    assert (
        len(next(make_batches(t5.text, pair_inputs([video], PROMPTS), 4, 2)).batch["images"]) == 4
    )
    expected = t5.generate([list(video) for _ in PROMPTS], PROMPTS, max_new_tokens=NEW)
    assert_same(t5.generate([video], PROMPTS, max_new_tokens=NEW, batch_size=4), expected)


def test_logprob_is_that_of_the_whole_answer(blip, answers):
    """Against `logits` of a training batch that has the answer as its target."""
    llm, examples = blip.variant.llm, []
    for prompt, answer, image in zip(PROMPTS, answers, images(5), strict=True):
        example = blip.text.prompt(prompt)
        tokens = list(answer.tokens)
        if llm.kind == "t5":
            example["targets"] = np.array(tokens)
            example["decoder_tokens"] = np.array([llm.decoder_start_id, *tokens[:-1]])
        else:
            before = example["tokens"]
            example["tokens"] = np.array([*before, *tokens])
            example["targets"] = np.array([*[IGNORE] * len(before), *tokens])
        pixels = Image.fromarray(image).resize((56, 56), Image.Resampling.BICUBIC)
        examples.append({"images": np.asarray(pixels)[None], **example})
    batch = collate(examples, visual_tokens=blip.variant.visual_tokens)
    del batch["truncated"]
    logprobs = np.asarray(jax.nn.log_softmax(blip.logits(batch)))
    targets = batch["targets"]
    own = np.take_along_axis(logprobs, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(
        np.where(targets == IGNORE, 0, own).sum(1),
        [answer.logprob for answer in answers],
        rtol=1e-4,
    )

    # The same rows padded on the left, and between tokens: compacted at the border.
    for left in (True, False):
        moved = scattered(batch, left)
        assert (np.diff(moved["segments"]) > 0).any()
        for name, leaf in compacted(moved).items():
            np.testing.assert_array_equal(leaf, batch[name], name)
        np.testing.assert_array_equal(blip.logits(moved), blip.logits(batch))


def test_nothing_compiles_after_the_warm_up(t5):
    ask = lambda count, prompts, **settings: t5.generate(
        images(count), prompts, max_new_tokens=NEW, **settings
    )
    ask(5, PROMPTS)
    ask(5, PROMPTS, temperature=0.5)
    with count_compiles() as compiled:
        ask(5, PROMPTS[::-1], repetition_penalty=1.5)
        ask(6, [PROMPTS[4]] * 6, min_new_tokens=2)
        ask(7, [f"{PROMPTS[4]} {i}" for i in range(7)], seed=5)
        ask(8, PROMPTS[4:], top_k=3, seed=1)
        ask(20, PROMPTS[4:], top_p=0.3)
    assert len(compiled) == 0
    with count_compiles() as compiled:
        t5.generate(images(5), PROMPTS, max_new_tokens=NEW + 1)
    assert len(compiled) > 0


def test_one_image_or_one_prompt_serves_the_others(t5):
    image, prompt = images(1), PROMPTS[:1]
    assert_same(
        t5.generate(image, PROMPTS, max_new_tokens=NEW),
        t5.generate(image * 5, PROMPTS, max_new_tokens=NEW),
    )
    assert_same(
        t5.generate(images(5), prompt, max_new_tokens=NEW),
        t5.generate(images(5), prompt * 5, max_new_tokens=NEW),
    )


def test_a_pipeline_says_what_it_is(t5):
    assert repr(t5).startswith("InstructBlipPipeline(a t5 model of its own size, float32, /")


def test_images_of_every_kind(t5, tmp_path):
    array = images(1)[0]
    path = tmp_path / "image.png"
    Image.fromarray(array).save(path)
    kinds = [array, Image.fromarray(array), path, str(path), path.read_bytes()]
    seen = t5.features(kinds, PROMPTS[:1])
    assert seen.shape == (5, 8, 40) and seen.dtype == np.float32
    for row in seen[1:]:
        np.testing.assert_allclose(row, seen[0], rtol=0, atol=1e-5)


def test_features_of_a_video_are_those_of_its_frames(t5):
    frames = images(3)
    video = t5.features([frames, frames[::-1]], PROMPTS[:1])
    assert video.shape == (2, 3 * 8, 40)
    each = t5.features(frames, PROMPTS[:1])
    np.testing.assert_allclose(video[0], each.reshape(24, 40), rtol=0, atol=1e-5)
    np.testing.assert_allclose(video[1], each[::-1].reshape(24, 40), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, r"num_beams is 0, expected at least 1 .*greedy"),
        ({"num_beams": 5, "top_k": 3}, "num_beams is 5, but a beam search does not draw"),
        ({"num_return_sequences": 2}, r"num_return_sequences is 2, expected 1 to num_beams \(1\)"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping is 'soon', expected one of"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"min_new_tokens": 31}, "min_new_tokens is 31, expected 0 to max_new_tokens"),
        ({"temperature": 0.0}, "temperature is 0.0, expected at least 1e-06 .*greedy"),
        ({"top_p": 1.5, "top_k": 0}, "top_k is 0, expected at least 1.*; top_p is 1.5, "),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected at least 1e-06"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"batch_size": 2.0}, "batch_size is 2.0, expected a whole number"),
        ({"batch_size": None}, "batch_size is None, expected a whole number"),
        ({"config": 20}, "config is 20, expected a GenerationConfig.*max_new_tokens=30"),
        ({"max_length": 20}, "unknown setting 'max_length': it is max_new_tokens"),
        ({"batch_size": 10**7}, "batch_size is 10000000, expected at least 1 and at most 65,536"),
    ],
)
def test_generate_refuses(t5, settings, message):
    with pytest.raises(ValueError, match=message):
        t5.generate(images(1), ["a"], **settings)


def test_scores_that_are_not_finite_are_an_error(t5):
    llm = {**t5.params["llm"], "head": {"kernel": t5.params["llm"]["head"]["kernel"] * np.nan}}
    broken = InstructBlipPipeline(t5.variant, {**t5.params, "llm": llm}, t5.text)
    with pytest.raises(ValueError, match=r"questions \[0, 1\] are not finite.* damaged"):
        broken.generate(images(2), ["a"])


def test_a_bad_image_is_named(t5, tmp_path):
    with pytest.raises(ValueError, match="nowhere.jpg: no such file"):
        t5.generate([tmp_path / "nowhere.jpg"], ["a"])


def test_a_prompt_over_the_limit(folders):
    llama = jax_instructblip.load(folders["llama"])
    limit = llama.variant.llm.max_positions - 8 - 30
    with pytest.raises(ValueError, match=f"may have {limit} tokens .*: prompt 1 has"):
        llama.generate(images(1), ["a", "dog " * limit])


@pytest.mark.parametrize("ask", ["generate", "stream"])
def test_more_tokens_than_the_cache_holds(blip, ask):
    t5 = blip.variant.llm.kind == "t5"
    most = 2048 if t5 else blip.variant.llm.max_positions - 8 - 1
    why = "the cache holds no more" if t5 else "positions, 8 of the image"
    call = {
        "generate": lambda count: blip.generate(images(1), ["a"], max_new_tokens=count),
        "stream": lambda count: blip.stream(images(1)[0], "a", max_new_tokens=count),
    }[ask]
    with pytest.raises(ValueError, match=rf"{most + 1} new tokens .* at most {most}: .*{why}"):
        call(most + 1)


def test_a_prompt_that_the_qformer_cannot_read_whole_is_reported(t5, caplog):
    parts = list(make_batches(t5.text, pair_inputs(images(1), ["dog " * 200]), batch_size=1))
    assert parts[0].batch["qformer_tokens"].shape == (1, 1, 128)
    assert "1 of 1 prompts have more than 128 tokens: the Q-Former reads" in caplog.text


@pytest.mark.parametrize(
    ("count", "batch_size", "rows"), [(5, 6, 6), (6, 6, 6), (3, 6, 4), (7, 6, 6)]
)
def test_batches_are_never_larger_than_asked_for(t5, count, batch_size, rows):
    parts = list(make_batches(t5.text, pair_inputs(images(count), ["a"]), batch_size))
    assert {len(part.rows) for part in parts} == {rows}
    assert sum(part.count for part in parts) == count


def test_load_casts(folders):
    with pytest.raises(ValueError, match="T5 cannot compute in float16"):
        jax_instructblip.load(folders["t5"], dtype=jnp.float16)
    half = jax_instructblip.load(folders["llama"], dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    assert half.logits(text_batch(half)).dtype == np.float32
    whole = jax_instructblip.load(folders["llama"])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(whole.params)} == {"float32"}


def text_batch(blip):
    example = {"images": np.zeros((1, 56, 56, 3), np.uint8), **blip.text.prompt("Why?")}
    batch = collate([example], visual_tokens=blip.variant.visual_tokens)
    del batch["truncated"]
    return batch


def test_unknown_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint 'shapes_x'.*does not exist"):
        resolve_checkpoint("shapes_x")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="is a file"):
        resolve_checkpoint(tmp_path / "file")
    with pytest.raises(ValueError, match="of no known kind: found file; expected a Hugging Face"):
        jax_instructblip.load(tmp_path)


def make_run(folder, frozen, *, step=3, scale=2.0, **meta):
    """A run directory as the training writes it, of a Q-Former whose projection is scaled."""
    qformer = checkpoint.read_tree(frozen)["qformer"]
    qformer["projection"]["kernel"] = qformer["projection"]["kernel"] * np.float32(scale)
    place = folder / "checkpoints" / str(step)
    place.mkdir(parents=True)
    checkpoint.write_tree(place / "trainable", checkpoint.flatten({"qformer": qformer}).items())
    found = {
        "step": step,
        "variant": json.loads((frozen / "config.json").read_text())["variant"],
        "trainable": ["qformer"],
        "base": {"path": str(frozen), "sha256": checkpoint.manifest_digest(frozen)},
        **meta,
    }
    (place / "meta.json").write_text(json.dumps(found))


def test_a_run_is_its_base_with_the_newest_weights_over_it(folders, t5, tmp_path):
    make_run(tmp_path, folders["t5"], step=9, scale=3.0, text={"qformer_limit": 64})
    make_run(tmp_path, folders["t5"], step=10, scale=2.0)
    (tmp_path / "checkpoints" / "11").mkdir()  # still being written
    for path, factor in ((tmp_path, 2.0), (tmp_path / "checkpoints" / "9", 3.0)):
        tuned = jax_instructblip.load(path)
        expected = checkpoint.flatten(t5.params)
        expected["qformer/projection/kernel"] = expected["qformer/projection/kernel"] * factor
        found = checkpoint.flatten(tuned.params)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[path], expected[path]) for path in expected)
    assert tuned.text.qformer_limit == 64


def test_a_run_of_another_base_is_refused(folders, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folders["t5"], base)
    make_run(tmp_path / "run", base)
    manifest = json.loads((base / "manifest.json").read_text())
    manifest["llm/head/kernel"]["sha256"] = "0" * 64
    (base / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.CheckpointError, match="was tuned on another base: .*put that"):
        jax_instructblip.load(tmp_path / "run")
    shutil.rmtree(base)
    with pytest.raises(FileNotFoundError, match="the base that .* is gone: looked for"):
        jax_instructblip.load(tmp_path / "run")


def test_a_base_is_found_by_name_where_its_path_is_gone(folders, tmp_path, monkeypatch):
    base = {"path": str(tmp_path / "gone"), "name": os.path.relpath(folders["t5"], tmp_path)}
    base["sha256"] = checkpoint.manifest_digest(folders["t5"])
    make_run(tmp_path / "run", folders["t5"], base=base)
    monkeypatch.chdir(tmp_path)
    assert isinstance(jax_instructblip.load("run"), InstructBlipPipeline)


def test_a_run_without_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="has not saved anything"):
        jax_instructblip.load(tmp_path)


def test_over_a_mesh(folders, t5):
    """Two devices, in a process of their own: the same answers."""
    code = f"""
import json, numpy as np, jax, jax_instructblip
from jax_instructblip.parallel.mesh import make_mesh
from tests.inference.test_pipeline import PROMPTS, images
assert jax.device_count() == 2
blip = jax_instructblip.load({str(folders["t5"])!r}, mesh=make_mesh())
found = blip.generate(images(3), PROMPTS[:3], max_new_tokens={NEW}, batch_size=3)
print(json.dumps([answer.tokens for answer in found]))
"""
    found = run_python(code, devices=2)
    expected = t5.generate(images(3), PROMPTS[:3], max_new_tokens=NEW)
    assert json.loads(found) == [list(answer.tokens) for answer in expected]


def test_arguments_of_another_kind_are_named(t5):
    with pytest.raises(ValueError, match="mesh is a list, expected a jax.sharding.Mesh or None"):
        jax_instructblip.load("shapes_t5", mesh=[])
    with pytest.raises(ValueError, match="pad_to is a tuple, expected Sizes or None"):
        t5.rank(images(1), ["a"], ["red"], pad_to=(1, 2, 3))
    for batch in (None, 5, [], "x"):
        with pytest.raises(ValueError, match="the batch is a .*, expected a dict of arrays"):
            t5.logits(batch)
    with pytest.raises(ValueError, match="this is not a batch: tokens is no array"):
        t5.logits({"tokens": [[1], [1, 2]]})
