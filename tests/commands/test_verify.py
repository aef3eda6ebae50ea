import json

import pytest
from PIL import Image

import jax_instructblip
from jax_instructblip.__main__ import main
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.data.tokenizer_files import load_tokenizers
from jax_instructblip.evaluation import published, verification
from jax_instructblip.evaluation.published import FACTS, read_facts
from jax_instructblip.inference.pipeline import Answer
from jax_instructblip.models.released import VARIANTS, get_variant

PROMPT = "Question: what color is the shape? Short answer:"
SETTINGS = {"max_new_tokens": 5}
IMAGES = {
    "red": {"description": "all red", "url": "https://red", "sha256": "0" * 64},
    "blue": {"description": "all blue", "url": "https://blue"},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name in IMAGES:
        Image.new("RGB", (56, 56), name).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def answer(pictures):
    """The embedded model's answer to the red picture."""
    blip = jax_instructblip.load("shapes_t5")
    return blip.generate([str(pictures / "red.png")], [PROMPT], **SETTINGS)[0]


@pytest.fixture
def verify(tmp_path, pictures, capsys):
    """`verify(ENTRIES, "red")`: exit code, standard output and error, the red picture given."""

    def verify(entries, *names, more=()):
        facts = tmp_path / "facts.json"
        facts.write_text(json.dumps({"images": IMAGES, "entries": entries}))
        given = [f"{name}={pictures / f'{name}.png'}" for name in names]
        words = ["--checkpoint", "shapes_t5", "--facts", str(facts), *more]
        code = main(["verify", *words, *(["--image", *given] if given else [])])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return verify


def entry(name, *answers, image="red", **more):
    fields = {"model": "", "prompt": PROMPT, "settings": SETTINGS, "source": "https://paper"}
    return {"name": name, "image": image, "published": list(answers), **fields, **more}


def test_matches(verify, answer):
    whole = {"by": "us", "text": answer.text, "tokens": answer.tokens}
    other = {"by": "them", "text": "something else"}
    code, out, _ = verify(
        [entry("tokens", whole), entry("text", other, {"by": "us", "text": answer.text})], "red"
    )
    assert code == 0
    assert out.splitlines() == [
        f"note: {out.split()[1]} is not the file that was published as red",
        "tokens  match",
        "text    match",
        "2 of 2 asked match, 0 differ, 0 not run",
    ]


def test_differences_are_shown_and_fail(verify, answer):
    longer = {"by": "us", "text": "", "tokens": [*answer.tokens, 7]}
    other = {"by": "them", "text": "", "tokens": [*answer.tokens[:1], 300, *answer.tokens[2:]]}
    code, out, _ = verify(
        [
            entry("longer", longer, note="in 8 bits"),
            entry("other", {"by": "nobody", "text": "", "tokens": [300]}, other),
            entry("right", {"by": "us", "text": answer.text}),
        ],
        "red",
    )
    assert code == 1
    lines = out.splitlines()[1:]
    count = len(answer.tokens)
    assert lines[0] == f"longer  differs at token {count}  (published in 8 bits)"
    assert lines[1].startswith("    expected  7 ") and lines[1].endswith("by us, https://paper")
    assert lines[2] == "    found     the end"
    assert lines[3] == f"    answer    {answer.text!r}"
    assert lines[4] == "other   differs at token 1"
    assert lines[5].startswith("    expected  300 ") and "by them" in lines[5]
    assert lines[6].startswith(f"    found     {answer.tokens[1]} ")
    assert lines[-2:] == ["right   match", "1 of 3 asked match, 2 differ, 0 not run"]


def test_what_was_not_given_is_listed_and_nothing_asked_is_no_success(verify, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the weights were loaded for nothing")

    monkeypatch.setattr("jax_instructblip.evaluation.verification.load", load)
    right = {"by": "us", "text": "red"}
    code, out, _ = verify([entry("one", right), entry("two", right, image="blue")])
    assert code == 1
    assert out.splitlines() == [
        *("not run without --image red=FILE (all red):", "    from https://red", "    one"),
        *("not run without --image blue=FILE (all blue):", "    from https://blue", "    two"),
        "0 of 0 asked match, 0 differ, 2 not run",
    ]


def test_what_is_not_run_does_not_fail_the_rest(verify, answer):
    right = {"by": "us", "text": answer.text}
    code, out, _ = verify([entry("one", right), entry("two", right, image="blue")], "red")
    assert code == 0
    assert out.splitlines()[-1] == "1 of 1 asked match, 0 differ, 1 not run"


def test_entries_of_other_models_are_left_out(verify, answer):
    right = {"by": "us", "text": answer.text}
    entries = [entry("one", right, model="tiny-t5"), entry("two", right, model="x")]
    code, _, err = verify(entries, "red")
    assert code == 1
    assert "has nothing about a model of these sizes; it knows tiny-t5, x: name one" in err
    code, out, _ = verify(entries, "red", more=["--model", "x"])
    assert code == 0 and "two  match" in out and "one" not in out


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["red"], "--image red: expected NAME=FILE, NAME of red, blue"),
        (["rde=a.png"], "--image rde=a.png: there is no image 'rde'; did you mean red?"),
        (["red=none.png"], "none.png: no such file"),
    ],
)
def test_wrong_images(verify, images, message):
    code, out, err = verify([entry("one", {"by": "us", "text": ""})], more=["--image", *images])
    assert (code, out) == (1, "")
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "green"}, "entry 0: image 'green' is none of red, blue"),
        ({"settings": {"num_beam": 1}}, "unknown setting 'num_beam'; did you mean 'num_beams'?"),
        ({"published": []}, "entry 0: published holds no answers"),
        ({"published": [{"text": "red"}]}, "published: found text, expected by, text, tokens"),
        (
            {"more": 1},
            "entry 0: found name, image, published, model, prompt, settings, source, mor",
        ),
    ],
)
def test_wrong_facts(tmp_path, change, message):
    path = tmp_path / "facts.json"
    rows = [entry("one", {"by": "us", "text": "red"}) | change]
    path.write_text(json.dumps({"images": IMAGES, "entries": rows}))
    with pytest.raises(ValueError, match="has facts that cannot be used") as raised:
        read_facts(path)
    assert message in str(raised.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"images": {}, "entries": 3}'])
def test_other_files_hold_no_facts(tmp_path, text):
    path = tmp_path / "facts.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="holds no facts .* expected an object with"):
        read_facts(path)


def test_differences_of_texts():
    said = Answer("a red cup on a long table", (), 0.0)
    share, found = verification.first_difference(
        None, said, published.Published("us", "a red cap on a long table")
    )
    assert (found.place, share) == ("character 7", 7 / 25)
    assert (found.expected, found.found) == (repr("a red cap on a long table"), repr(said.text))
    share, found = verification.first_difference(None, said, published.Published("us", "a red"))
    assert (found.place, found.expected, share) == ("character 5", "the end", 1)
    _, found = verification.first_difference(None, said, published.Published("us", said.text + "."))
    assert (found.place, found.expected, found.found) == (
        "character 25",
        repr(" cup on a long table."),
        "the end",
    )


def test_the_shipped_facts_are_of_models_that_have_names():
    images, entries = read_facts(FACTS)
    assert {each.image for each in entries} == set(images)
    ours = [each for each in entries if each.model in VARIANTS]
    assert {each.model for each in ours} >= {"instructblip-flan-t5-xl", "instructblip-vicuna-7b"}
    assert len({(each.model, each.name) for each in entries}) == len(entries)
    assert all(each.published and each.source.startswith("https://") for each in entries)


@pytest.mark.parametrize(
    ("kind", "name", "count"),
    [("t5", "instructblip-flan-t5-xl", 2), ("llama", "instructblip-vicuna-7b", 2)],
)
def test_shipped_tokens_say_the_shipped_texts(shared, kind, name, count):
    folder = shared / "data" / "tokenizers"
    tokenizers = load_tokenizers(folder / kind, folder / "bert-base-uncased", kind)
    text = TextProcessor(get_variant(name), *tokenizers)
    answers = [
        each for entry in read_facts(FACTS)[1] if entry.model == name for each in entry.published
    ]
    told = [each for each in answers if each.tokens]
    assert len(told) == count
    assert [text.decode(each.tokens) for each in told] == [each.text for each in told]


def test_shipped_images_are_the_published_files(shared):
    images, _ = read_facts(FACTS)
    folder = shared / "data" / "images" / "lavis"
    assert published.is_published_file(
        images["confusing-pictures"], folder / "Confusing-Pictures.jpg"
    )
    assert published.is_published_file(images["merlion"], folder / "merlion.png")
    assert not published.is_published_file(images["merlion"], folder / "Confusing-Pictures.jpg")
