"""LLaVA asked through the pipeline: beside transformers, in any batch, by its stored template."""

import dataclasses
import functools
import io
import json
import shutil
import types

import numpy as np
import pytest
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import jax_instructblip
from jax_instructblip.commands import convert as convert_command
from jax_instructblip.data.chat_templates import CHAT_TEMPLATES
from jax_instructblip.data.conversation import Conversation, Turn
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.inference.loading import read_source
from tests.helpers.language_folders import make_bytes, tokenizer_of
from tests.helpers.llava_folders import IMAGE, PATCHES, write_llava

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")

NEW, POSITIONS = 6, 512
WORDS = "what color is it red green blue white which image number one two three four".split()
SYSTEM = CHAT_TEMPLATES["v1"].message
TEXT = [SYSTEM, " ".join(WORDS), "USER: what ASSISTANT: red", "You are a helpful assistant."]
LLAMA3 = CHAT_TEMPLATES["llama3"].tokens


def special_llama3():
    names = {"bos_token": LLAMA3[0], "eos_token": "<|end_of_text|>"}
    tokenizer = make_bytes(TEXT, **names)
    tokenizer.add_tokens(list(LLAMA3[1:]), special_tokens=True)
    return tokenizer


# The language model, a linear projector or not, the template that its tokenizer brings.
CASES = {
    "linear": ("llama", True, lambda: tokenizer_of("llama", TEXT), "v1"),
    "mlp2x": ("llama", False, lambda: tokenizer_of("llama", TEXT), "v1"),
    "llama3": ("llama3", False, special_llama3, "llama3"),
}


@pytest.fixture(scope="module")
def make_pair(tmp_path_factory):
    @functools.cache
    def make(name):
        kind, linear, make_tokenizer, template = CASES[name]
        folder = tmp_path_factory.mktemp("llava") / name
        theirs = write_llava(folder, kind, linear, make_tokenizer(), POSITIONS)
        ours = tmp_path_factory.mktemp("ours") / name
        jax_instructblip.convert(folder, ours)
        blip = jax_instructblip.load(ours)
        blip.silent = True
        assert blip.text.input_format == InputFormat(template, image_crop="clip")
        return types.SimpleNamespace(folder=folder, ours=ours, theirs=theirs, blip=blip)

    return make


@pytest.fixture
def pair(make_pair):
    """A model whose answers end with one of two ids."""
    return make_pair("llama3")


def prompts(count, longest=20, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(count)]


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(IMAGE // 2, 3 * IMAGE, (count, 2))
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def their_input(pair, prompt, images, **processing):
    """The ids with placeholders, and the pixels, both as transformers takes them."""
    example = pair.blip.text.prompt(prompt, len(images))
    ids, image = example["tokens"].tolist(), pair.theirs.config.image_token_index
    for at in reversed(example["image_at"].tolist()):
        ids[at:at] = [image] * PATCHES
    side = {"height": IMAGE, "width": IMAGE}
    processor = LlavaImageProcessorPil(size={"shortest_edge": IMAGE}, crop_size=side, **processing)
    pixels = processor([Image.fromarray(each) for each in images], return_tensors="pt")
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels.pixel_values}


def their_answer(pair, prompt, images, settings=None, **processing):
    """The new ids of `generate`, one list a returned answer."""
    given = their_input(pair, prompt, images, **processing)
    with torch.no_grad():
        made = pair.theirs.generate(
            **given,
            attention_mask=torch.ones_like(given["input_ids"]),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=sorted(pair.blip.text.stop_ids),
            **settings or {},
        )
    return [row[given["input_ids"].shape[1] :].tolist() for row in made]


@pytest.mark.parametrize("name", ["linear", "mlp2x"])
def test_greedy_tokens_of_twenty_prompts(make_pair, name):
    """Tokens equal those of transformers, in padded batches and alone."""
    pair = make_pair(name)
    questions, images = prompts(20), pictures(20)
    found = pair.blip.generate(images, questions, max_new_tokens=NEW)
    (alone,) = pair.blip.generate(images[0], questions[0], max_new_tokens=NEW)
    assert alone.tokens == found[0].tokens
    for answer, question, image in zip(found, questions, images, strict=True):
        assert list(answer.tokens) == their_answer(pair, question, [image])[0]
    assert len({answer.tokens for answer in found}) > 10


def ends_early(pair, words=4):
    """A copy of the pipeline in which the first tokens of some answers end an answer."""
    text = dataclasses.replace(pair.blip.text)
    answers = pair.blip.generate(pictures(words), "what", max_new_tokens=NEW)
    often = {token for answer in answers for token in answer.tokens[1::2]}
    text.__dict__["stop_ids"] = text.stop_ids | often
    blip = pair.blip
    return type(blip)(blip.variant, blip.params, text, silent=True)


@pytest.mark.parametrize("beams", [1, 3])
def test_many_ends_are_those_of_transformers(pair, beams):
    other = types.SimpleNamespace(theirs=pair.theirs, blip=ends_early(pair))
    questions, images = prompts(6, seed=1), pictures(6, seed=1)
    settings = {"num_beams": beams, "num_return_sequences": beams}
    rule = {"length_rule": "transformers5"} if beams > 1 else {}
    found = other.blip.generate(images, questions, max_new_tokens=NEW, **settings, **rule)
    lengths = set()
    for answer, question, image in zip(found, questions, images, strict=True):
        theirs = their_answer(other, question, [image], settings)
        for mine, row in zip((answer, *answer.alternatives), theirs, strict=True):
            count = len(mine.tokens)
            assert list(mine.tokens) == row[:count] and len(set(row[count:])) <= 1  # padding
            assert count == NEW or mine.tokens[-1] in other.blip.text.stop_ids
            lengths.add(count)
    assert len(lengths) > 2


def test_several_images_a_place_for_each_and_none(pair):
    images = pictures(2, seed=3)
    asked = [
        ("what", images),
        ("which <image> is red <image>", images),
        ("what color is it\n<image>", images[:1]),
        ([("user", "what"), ("assistant", "red"), ("user", "which")], images[:1]),
        (Conversation("c", (Turn("user", "is it red"),), system=""), images[1:]),
    ]
    found = pair.blip.generate([each for _, each in asked], [p for p, _ in asked], max_new_tokens=4)
    for answer, (prompt, each) in zip(found, asked, strict=True):
        assert list(answer.tokens) == their_answer(pair, prompt, each)[0][:4]
    swapped = pair.blip.generate([images[::-1]], ["what"], max_new_tokens=4)
    assert swapped[0].logprob != found[0].logprob  # the order of images counts
    (alone,) = pair.blip.generate(None, "what color is red", max_new_tokens=4)
    ids = torch.tensor([pair.blip.text.prompt("what color is red", 0)["tokens"].tolist()])
    with torch.no_grad():
        logits = pair.theirs(input_ids=ids).logits[0, -1]
    assert alone.tokens[0] == int(logits.argmax())


def test_a_padded_image_is_that_of_transformers(pair):
    """LLaVA v1.5's own preparation, which transformers has as an option."""
    form = dataclasses.replace(pair.blip.text.input_format, image_crop="pad")
    blip, text = pair.blip, dataclasses.replace(pair.blip.text, input_format=form)
    padded = type(blip)(blip.variant, blip.params, text, silent=True)
    wide = pictures(1, seed=5)[0][:IMAGE, :]
    wide = np.concatenate([wide] * 3, axis=1)
    (answer,) = padded.generate(wide, "what", max_new_tokens=NEW)
    assert list(answer.tokens) == their_answer(pair, "what", [wide], do_pad=True)[0]
    (other,) = blip.generate(wide, "what", max_new_tokens=NEW)
    assert answer.logprob != other.logprob


def test_ranking_is_by_the_probabilities_of_the_answer(pair):
    candidates = ["red", "green", "red blue", "one two three"]
    image = pictures(1)[0]
    scores = pair.blip.rank(image, "what color is it", candidates)[0]
    for candidate, score in zip(candidates, scores, strict=True):
        given = their_input(pair, "what color is it", [image])
        ids = torch.tensor([pair.blip.text.candidate(candidate).tolist()])
        given["input_ids"] = torch.cat([given["input_ids"], ids], dim=1)
        with torch.no_grad():
            logits = pair.theirs(**given).logits[0, -ids.shape[1] - 1 : -1].log_softmax(-1)
        assert abs(float(logits.gather(1, ids.T).sum()) - score) < 1e-4
    with pytest.raises(ValueError, match="'<image>' has an <image>: images stand in prompts"):
        pair.blip.rank(image, "what", ["<image>"])


def test_a_stream_is_the_answer(pair):
    for question, image in zip(prompts(3, seed=2), pictures(3, seed=2), strict=True):
        (answer,) = pair.blip.generate(image, question, max_new_tokens=NEW)
        assert "".join(pair.blip.stream(image, question, max_new_tokens=NEW)) == answer.text


def test_features_are_the_projected_patches(pair):
    images = pictures(2)
    found = pair.blip.features(images, "what")
    with torch.no_grad():
        pixels = their_input(pair, "what <image> <image>", images)["pixel_values"]
        theirs = pair.theirs.get_image_features(pixel_values=pixels)
    theirs = getattr(theirs, "pooler_output", theirs)
    np.testing.assert_allclose(found, np.stack([each.numpy() for each in theirs]), atol=1e-4)
    with pytest.raises(ValueError, match=r"prompts with \[0, 1\] images have no features"):
        pair.blip.features([images[0], None], "what")


def mixed(count, longest, seed=0):
    """Prompts of mixed length about images of mixed kinds: how many, their form and size."""
    rng = np.random.default_rng(seed)
    questions, images = prompts(count, longest, seed), []
    for index, array in enumerate(pictures(2 * count, seed)[:count]):
        image = Image.fromarray(array)
        file = io.BytesIO()
        image.save(file, "PNG")
        kinds = (array, image.convert("L"), file.getvalue(), image.convert("RGBA"), array[..., 0])
        number = int(rng.choice([0, 1, 1, 1, 2]))
        images.append([kinds[(index + n) % len(kinds)] for n in range(number)])
        if number == 2 and index % 2:
            questions[index] = f"<image> {questions[index]} <image>"
    return images, questions


def differing(blip, count, longest, sizes=(1, 2, 8)):
    images, questions = mixed(count, longest)
    settings = dict(max_new_tokens=NEW)
    answers = [blip.generate(images, questions, batch_size=size, **settings) for size in sizes]
    order = np.random.default_rng(1).permutation(count)
    shuffled = blip.generate(
        [images[n] for n in order], [questions[n] for n in order], batch_size=sizes[-1], **settings
    )
    answers.append([shuffled[n] for n in np.argsort(order)])
    for other in answers[1:]:
        worst = max(abs(a.logprob - b.logprob) for a, b in zip(answers[0], other, strict=True))
        assert worst < 1e-3
    tokens = [[each.tokens for each in row] for row in answers]
    assert len(set(tokens[0])) > count // 3
    return sum(len(set(each)) > 1 for each in zip(*tokens, strict=True))


def test_no_answer_depends_on_its_batch(make_pair):
    assert differing(make_pair("mlp2x").blip, 60, longest=24) == 0


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_no_answer_of_five_hundred_depends_on_its_batch(make_pair, name):
    assert differing(make_pair(name).blip, 500, longest=90) == 0


def test_the_template_goes_with_the_model(pair, tmp_path):
    """A saved folder keeps it; a load can choose another one, and a conversion store it."""
    pair.blip.save(tmp_path / "saved")
    assert read_source(tmp_path / "saved").input_format == pair.blip.text.input_format
    image = pictures(1)[0]
    (answer,) = pair.blip.generate(image, "what", max_new_tokens=NEW)
    (again,) = jax_instructblip.load(tmp_path / "saved").generate(image, "what", max_new_tokens=NEW)
    assert again.tokens == answer.tokens
    other = "v0"
    chosen = jax_instructblip.load(pair.ours, template=other)
    assert chosen.text.input_format.template == other
    assert (
        chosen.text.prompt("what", 1)["tokens"].tolist()
        != pair.blip.text.prompt("what", 1)["tokens"].tolist()
    )
    command = [str(pair.folder), "--out", str(tmp_path / "stored"), "--template", other]
    assert convert_command.main(command) == 0
    assert read_source(tmp_path / "stored").input_format.template == other
    with pytest.raises(
        ValueError, match="'chatml' is of another tokenizer .* fit it: v0, plain, l"
    ):
        jax_instructblip.load(pair.ours, template="chatml")
    with pytest.raises(ValueError, match="template is 'v9', expected one of"):
        jax_instructblip.load(pair.ours, template="v9")
    with pytest.raises(ValueError, match="'chatml' is of another tokenizer"):
        jax_instructblip.convert(pair.folder, tmp_path / "wrong", template="chatml")
    assert not (tmp_path / "wrong").exists()


def test_a_folder_without_a_format_has_the_usual_one(pair, tmp_path):
    """A folder of Hugging Face, and one that was converted before formats were stored."""
    assert read_source(pair.folder).input_format == pair.blip.text.input_format
    older = shutil.copytree(pair.ours, tmp_path / "older")
    config = json.loads((older / "config.json").read_text())
    stored = config.pop("input_format")
    assert stored["template"] == "llama3" and stored["image_crop"] == "clip"
    (older / "files.json").unlink()
    (older / "config.json").write_text(json.dumps(config))
    assert read_source(older).input_format == pair.blip.text.input_format
    (older / "config.json").write_text(json.dumps(config | {"input_format": {"template": "v9"}}))
    with pytest.raises(ValueError, match="config.json is damaged: input_format: template is 'v9'"):
        read_source(older)


BAD = [
    ("what <image>", [], "it has 1 <image> in its questions, but 0 images"),
    ("what <image>", 2, "it has 2 images, but 1 <image> in its questions: each image needs one"),
    ("<image> what <image>", 1, "it has 2 <image> in its questions, but 1 images"),
    ([("user", "a"), ("assistant", "b")], 1, "the last of which is an answer, expected a question"),
    (
        "what " * 600,
        1,
        r"a prompt may have 490 tokens \(beside 16 of the image and 6 of the answer",
    ),
    ("what", 40, "6 new tokens are asked for .* expected at most -129"),
    (7, 1, "prompt 0 is 7, expected a text, a Conversation or a list of its turns"),
]


@pytest.mark.parametrize(("prompt", "count", "said"), BAD)
def test_what_cannot_be_asked_is_named(pair, prompt, count, said):
    images = pictures(2)[:count] if isinstance(count, int) and count < 3 else pictures(1) * 40
    images = count if isinstance(count, list) else images
    with pytest.raises(ValueError, match=said):
        pair.blip.generate([images], [prompt], max_new_tokens=NEW)


def test_the_limit_counts_images(pair):
    """The model has more positions than its prompts may have slots: 64 here, 2,048 in LLaVA."""
    form = dataclasses.replace(pair.blip.text.input_format, limit=64)
    blip, text = pair.blip, dataclasses.replace(pair.blip.text, input_format=form)
    short = type(blip)(blip.variant, blip.params, text, silent=True)
    with pytest.raises(ValueError, match=r"a prompt may have 32 tokens \(beside 32 of the image"):
        short.generate([pictures(2)], ["what " * 30], max_new_tokens=NEW)
    with pytest.raises(ValueError, match="4 images take 64 slots, and a prompt has at most 64 in"):
        short.generate([pictures(2) * 2], ["what"], max_new_tokens=NEW)
