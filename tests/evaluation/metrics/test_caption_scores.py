import dataclasses
import json
import shutil
import subprocess

import pytest

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.metrics import caption_scores
from jax_instructblip.evaluation.metrics.caption_scores import score_captions, tokenise_stanford
from jax_instructblip.evaluation.metrics.metric import MetricError, Response

pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap: pip install -e .[eval]")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")

NAMES = {
    **{"cider": "CIDEr", "rouge_l": "ROUGE_L", "meteor": "METEOR"},
    **{f"bleu_{n}": f"Bleu_{n}" for n in (1, 2, 3, 4)},
}
RESULTS = {
    "coco-caption_fakecap_x_val2017": "coco-caption/captions_val2014_fakecap_results.json",
    "cocoapi_fakecap_x_val2017": "cocoapi/captions_val2014_fakecap_results.json",
    "degenerate_val2017": "captions_val2017_degenerate_results.json",
}


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "data" / "captioning"


@pytest.fixture(scope="module")
def golden(folder):
    return json.loads((folder / "golden_scores.json").read_text())[
        "computed_here_with_pycocoevalcap_1.2"
    ]


@pytest.fixture(scope="module")
def captioned(folder):
    """`captioned(NAME)`: responses and records of a file of predictions about COCO's val2017."""
    rows = json.loads((folder / "captions_val2017.json").read_text())["annotations"]
    references = {}
    for row in rows:
        references.setdefault(row["image_id"], []).append(row["caption"])

    def captioned(name):
        given = json.loads((folder / RESULTS[name]).read_text())
        said = {row["image_id"]: row["caption"] for row in given if row["image_id"] in references}
        records = [record(str(key), *references[key]) for key in references if key in said]
        return [Response(str(key), text) for key, text in said.items()], records

    return captioned


def record(name, *captions):
    return Record(name, (f"{name}.jpg",), "", captions)


def check(scores, golden, records):
    for name in scores.values:
        assert scores.values[name] == pytest.approx(golden[NAMES[name]], rel=1e-12, abs=1e-18)
    of_each = dict(zip((each.id for each in records), scores.samples["cider"], strict=True))
    for name, value in golden["per_image_CIDEr_first5"].items():
        assert of_each[name] == pytest.approx(value, rel=1e-12)
    assert golden["n"] == len(records)


@pytest.mark.parametrize("java", [False, pytest.param(True, marks=needs_java)])
@pytest.mark.parametrize("name", list(RESULTS)[:2])
def test_recorded_scores(captioned, golden, name, java):
    responses, records = captioned(name)
    scores = score_captions(responses, records, java=java)
    assert list(scores.values) == ["cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"]
    check(scores, golden[name], records)
    assert ("no Java" in " ".join(scores.notes)) is not java


@pytest.mark.full
def test_recorded_scores_of_degenerate_captions_on_the_whole_split(captioned, golden):
    responses, records = captioned("degenerate_val2017")
    check(score_captions(responses, records, java=False), golden["degenerate_val2017"], records)


@needs_java
def test_recorded_scores_of_each_image_with_meteor(folder, golden):
    images = json.loads((folder / "coco-caption" / "golden_126_images.json").read_text())
    records = [record(str(each["image_id"]), *each["references"]) for each in images["images"]]
    responses = [Response(str(each["image_id"]), each["candidate"]) for each in images["images"]]
    scores = score_captions(responses, records, full=True)
    for name in ("cider", "bleu_1", "bleu_4", "rouge_l", "meteor"):
        expected = [each[NAMES[name]] for each in images["images"]]
        assert scores.samples[name] == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert scores.values["meteor"] == pytest.approx(images["corpus"]["METEOR"], rel=1e-12)
    if "spice" not in scores.values:
        assert scores.left_out["spice"].startswith("its language model")


def test_what_cannot_be_computed_is_said():
    records = [record("1", "a red cup on a table"), record("2", "two dogs in a park")]
    responses = [Response("1", "a cup"), Response("2", "dogs")]
    scores = score_captions(responses, records, full=True, java=False)
    (note,) = scores.notes
    assert note.startswith(
        "no Java: words are those of jax_instructblip.evaluation.metrics.penn_treebank"
    )
    assert scores.left_out == dict.fromkeys(("meteor", "spice"), "it needs Java")
    assert not scores.left_out.keys() & scores.values.keys()
    single = score_captions(responses[:1], records[:1], java=False)
    assert single.values["cider"] == 0
    assert "CIDEr of a single image is 0: no word is rarer than another" in single.notes


class Spice:
    """Answers as pycocoevalcap's does: by sorted ids."""

    def compute_score(self, references, candidates):
        assert references.keys() == candidates.keys()
        return 0.5, [{"All": {"f": float(name)}, "Color": {}} for name in sorted(references)]


def test_spice_answers_in_another_order():
    references = {name: ["a cup"] for name in ("3", "1", "2")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_scores, "_scorer", lambda module, name: Spice)
        ((value, of_each),) = caption_scores._spice(references, references)
    assert (value, list(of_each)) == (0.5, [3.0, 1.0, 2.0])


def test_empty_captions_are_worth_nothing():
    records = [record("1", "a red cup on a table"), record("2", "two dogs in a park")]
    scores = score_captions([Response("1"), Response("2", "...")], records, java=False)
    assert scores.values["cider"] == scores.values["rouge_l"] == 0
    assert scores.values["bleu_1"] == pytest.approx(0, abs=1e-9)


def test_java_is_demanded_in_vain(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MetricError, match="no `java` on the PATH"):
        score_captions([Response("1", "a")], [record("1", "a")], java=True)
    assert "no Java" in score_captions([Response("1", "a")], [record("1", "a")]).notes[0]


def test_the_tools_are_not_installed(monkeypatch):
    monkeypatch.setattr(caption_scores, "TOOLS", "pycocoevalcap_of_nobody")
    with pytest.raises(MetricError, match=r"not installed: pip install -e '.\[eval\]'"):
        score_captions([Response("1", "a")], [record("1", "a")])


@needs_java
def test_a_tokeniser_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(caption_scores, "TOKENISER", "tokenizer/none.jar")
    with pytest.raises(MetricError, match="made 0 lines of 2 captions and ended with 1"):
        tokenise_stanford(["a", "b"])


def test_lines_that_are_lost_are_told(monkeypatch):
    done = subprocess.CompletedProcess([], 0, b"a\n", b"")
    monkeypatch.setattr(caption_scores.subprocess, "run", lambda *args, **kwargs: done)
    assert tokenise_stanford(["a."]) == ["a"]
    with pytest.raises(MetricError, match="made 1 lines of 2 captions and ended with 0"):
        tokenise_stanford(["a", "b"])


def test_each_domain_is_scored_by_its_own_references(captioned):
    """CIDEr of a domain is that of its records alone: words are weighed by their references."""
    responses, records = captioned("coco-caption_fakecap_x_val2017")
    kinds = ("in-domain", "out-domain")
    records = [
        dataclasses.replace(each, task=f"nocaps/{kinds[number % 2]}")
        for number, each in enumerate(records)
    ]
    scores = score_captions(responses, records, java=False)
    for number, kind in enumerate(kinds):
        some = records[number::2]
        ids = {each.id for each in some}
        alone = score_captions([each for each in responses if each.id in ids], some, java=False)
        assert scores.values[f"cider/{kind}"] == pytest.approx(alone.values["cider"])
        assert scores.values[f"cider/{kind}"] != pytest.approx(scores.values["cider"])
    assert next(iter(scores.values)) == "cider"
    assert scores.standard_errors()["cider/in-domain"] > 0
