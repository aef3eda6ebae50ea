import html.parser
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from jax_instructblip.__main__ import main
from jax_instructblip.data.readers.choices import read_iconqa
from jax_instructblip.evaluation import benchmarks, beside
from jax_instructblip.evaluation.beside import open_ways
from jax_instructblip.evaluation.llava_protocols import SHORT_ANSWER
from jax_instructblip.evaluation.reports import beside_page
from jax_instructblip.evaluation.settings import Settings
from jax_instructblip.inference.pipeline import Answer
from tests.data.readers.test_llava_bench import ROW, write
from tests.helpers.fake_pipeline import FakePipeline
from tests.helpers.raw_layouts import write_all
from tests.helpers.tiny import write_base


class Talker(FakePipeline):
    """Answers at length."""

    def answer(self, questions, config, batch_size):
        self._check(questions, batch_size, config)
        return [Answer(f"Well, {each.prompt}", (1,), -0.5) for each in questions]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    base = write_base(folder / "base", "t5")
    return base, shutil.copytree(base, folder / "another" / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    raws = write_all(folder, ["gqa", "iconqa"])
    image = next((raws["gqa"] / "images").iterdir())
    damaged = next(read_iconqa(raws["iconqa"], "test")).images[0]
    Path(str(damaged)).write_bytes(b"no image")
    (folder / "llava_bench_wild" / "images").mkdir(parents=True)
    shutil.copy(image, folder / "llava_bench_wild/images/001.jpg")
    write(folder / "llava_bench_wild/questions.jsonl", ROW)
    return folder


@pytest.fixture
def models(bases, monkeypatch):
    """The loaded models, by path."""
    loaded = {}

    def load(path, **fields):
        kind = Talker if "another" in str(path) else FakePipeline
        return loaded.setdefault(str(path), kind())

    monkeypatch.setattr(benchmarks, "load", load)
    return loaded


def words(bases, data, out, *more):
    given = {"checkpoint": bases[0], "data": data, "out": out, "limit": 4, "batch_size": 2}
    first = ["evaluate", *(f"--{name}={value}" for name, value in given.items())]
    return [*first, "--beside", str(bases[1]), *more]


def test_checkpoints_are_asked_the_same_in_every_way(bases, data, tmp_path, models, capsys):
    given = words(bases, data, tmp_path, "--datasets", "gqa,iconqa,llava_bench_wild")
    given[given.index("--limit=4")] = "--limit=15"  # all, the one with a damaged image too
    assert main(given) == 0
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["checkpoints"] == {"base": str(bases[0]), "base-2": str(bases[1])}
    results = document["datasets"]
    ways = {name: list(by_way) for name, by_way in results.items()}
    assert ways["gqa"] == ["generate", "short"]
    assert ways["iconqa"] == ["generate", "short", "rank"]
    assert ways["llava_bench_wild"] == ["generate"]
    gqa = results["gqa"]
    assert gqa["generate"]["base"]["prompt"] == "{question}"
    assert gqa["short"]["base"]["prompt"] == f"{{question}}\n{SHORT_ANSWER}"
    options = "Question: {question} Options: {options}."
    assert results["iconqa"]["generate"]["base"]["prompt"] == options
    assert results["iconqa"]["rank"]["base"]["prompt"] == f"{options} Short answer:"
    # Images, prompts, settings and candidates are the same for both.
    first, second = models.values()
    assert first.calls == second.calls and len(first.calls) > 4
    for by_way in results.values():
        for by_model in by_way.values():
            one, two = ({**each, "checkpoint": ""} for each in by_model.values())
            assert (one["prompt"], one["settings"]) == (two["prompt"], two["settings"])
    ranked = [
        (tmp_path / f"rank/{name}/predictions/iconqa.jsonl").read_text()
        for name in ("base", "base-2")
    ]
    assert ranked[0] == ranked[1]  # both rank by the images
    said = capsys.readouterr().out
    table = (tmp_path / "beside.md").read_text()
    value = f"{results['iconqa']['rank']['base']['value']:.2f}"
    row = next(line for line in table.splitlines() if line.startswith("| iconqa | rank |"))
    assert row.split(" | ")[4].startswith(value) and "accuracy | 15" in row
    assert "| llava_bench_wild | generate | - | 1 | not scored | not scored |" in table
    assert "llava_bench_wild, generate: NOT SCORED, a judge compares" in table
    assert "dataset           answered  metric" in said
    for text in (said, table):
        assert "iconqa, rank, base-2: 1 of 15 could not be asked, and count as wrong" in text
    page = (tmp_path / "beside.html").read_text()
    assert page.index("<h2>llava_bench_wild") < page.index("<h2>gqa")  # long answers first
    assert "<b>generate</b>: <span" not in page and "Well, What is it?" in page
    assert (tmp_path / "generate/base-2/answers/llava_bench_wild.jsonl").is_file()
    # What is answered already is not asked again.
    for model in models.values():
        model.calls.clear()
    assert main(given) == 0 and not any(model.calls for model in models.values())
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["datasets"] == results


def test_each_checkpoint_has_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = ["x/m-2", "y/m", "z/m", "gs://b/m", "..", "a/..", ".", "/", "gs://b"]
    named = beside._names(given)
    assert list(named.values()) == given
    here = tmp_path.name
    names = ["m-2", "m", "m-3", "m-4", tmp_path.parent.name, here, f"{here}-2", "model", "b"]
    assert list(named) == names


def test_a_model_without_a_score_is_named():
    entry = {"unscored": "", "problems": [], "count": 2}
    odd = {**entry, "unscored": "too few"}
    found = lambda **models: beside_page.shortcomings({"datasets": {"gqa": {"rank": models}}})
    assert found(a=entry, b=odd) == ["gqa, rank, b: NOT SCORED, too few"]
    assert found(a=odd, b=odd) == ["gqa, rank: NOT SCORED, too few"]
    assert found(a=entry, b=entry) == []


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Six questions of two families, of which one has choices."""
    folder = tmp_path_factory.mktemp("own")
    rows = []
    for number in range(3):
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(folder / f"{number}.png")
        row = {"image": f"{number}.png", "prompt": f"What & {number}?", "answer": "well"}
        rows += [{**row, "task": "what"}, {**row, "task": "which", "choices": ["no", "well"]}]
    rows[0]["answer"] = f"Well, {rows[0]['prompt']}"  # the talker's answer
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "own.jsonl")


class Outline(html.parser.HTMLParser):
    """The tables of a page, its text, and the addresses that it refers to."""

    VOID = ("meta", "img", "br")

    def __init__(self, page):
        super().__init__()
        self.tables, self.addresses, self.text, self._open = [], [], "", []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data


def test_families_of_own_data_stand_in_one_page(bases, own, tmp_path, models):
    given = ["evaluate", "--checkpoint", str(bases[0]), "--beside", str(bases[1])]
    given += ["--data", own, "--out", str(tmp_path)]
    assert main(given) == 0
    (by_way,) = json.loads((tmp_path / "results.json").read_text())["datasets"].values()
    counts = {way: by_model["base"]["count"] for way, by_model in by_way.items()}
    assert counts == {"generate": 6, "short": 6, "rank": 3}
    assert by_way["generate"]["base"]["prompt"] == "{question}"
    assert by_way["short"]["base-2"]["prompt"] == f"{{question}}\n{SHORT_ANSWER}"
    page = Outline((tmp_path / "beside.html").read_text())
    _, scores, families, answers = page.tables
    assert scores[0] == ["dataset", "answered", "metric", "records", "base", "base-2"]
    assert [row[1] for row in scores[1:]] == ["generate", "short", "rank"]
    assert families[0] == ["family", "answered", "questions", "base", "base-2", "constant"]
    assert families[1] == ["what", "generate", "3", "0.0", "33.3", "66.7"]
    ranked = [entry["values"]["accuracy/which"] for entry in by_way["rank"].values()]
    assert families[-1] == ["which", "rank", "3", *(f"{each:.1f}" for each in ranked), "100.0"]
    assert [len(row) for row in answers] == [3] * 7
    assert answers[1][0] == "What & 0?truth: Well, What & 0?"
    assert answers[1][2].startswith("generate (1.00): Well, What & 0?short (0.00): Well, What")
    assert ["rank (" in row[1] for row in answers[1:]] == [False, True] * 3
    assert len(page.addresses) == 6  # pictures within the page, no other file
    assert all(each.startswith("data:image/png;base64,") for each in page.addresses)
    text = (tmp_path / "beside.md").read_text()
    assert "| what | generate | 3 | 0.0 | 33.3 | 66.7 |" in text


def test_own_data_without_choices_are_not_ranked(bases, own, tmp_path):
    rows = [json.loads(line) for line in Path(own).read_text().splitlines()]
    plain = Path(own).with_name("plain.jsonl")
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows if "choices" not in row))
    given = {"checkpoint": "a", "beside": ["b"], "data": str(plain), "out": str(tmp_path)}
    assert list(open_ways(Settings.of(**given), "t5")) == ["generate", "short"]
    with pytest.raises(ValueError, match="with --mode rank: no record has `choices`"):
        open_ways(Settings.of(mode="rank", **given), "t5")
    ranked = open_ways(Settings.of(**{**given, "data": own}, length_normalise=True), "t5")["rank"]
    assert ranked[0].settings == {"length_normalise": True}


@pytest.mark.parametrize(
    ("names", "fields", "expected"),
    [
        ("gqa,iconqa", {"mode": "rank"}, "gqa cannot be answered with --mode rank"),
        ("iconqa", {"mode": "rank"}, {"rank": ["{options}?"]}),
        ("iconqa", {"mode": "generate"}, ["generate", "short"]),
    ],
)
def test_the_mode_leaves_out_ways(data, names, fields, expected):
    settings = Settings.of(
        checkpoint="a", datasets=names, data=data, out="out", prompt="{options}?", **fields
    )
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            open_ways(settings, "t5")
        return
    found = open_ways(settings, "t5")
    assert list(found) == list(expected)
    assert found[list(expected)[0]][0].protocol.prompt == "{options}?"


def test_settings_that_no_way_uses_are_refused(data):
    given = {"checkpoint": "a", "data": data, "out": "out"}
    settings = Settings.of(datasets="gqa", k=3, **given)
    with pytest.raises(ValueError, match="--k: not used by gqa"):
        open_ways(settings, "t5")
    used = Settings.of(datasets="iconqa", length_normalise=True, num_beams=1, **given)
    assert open_ways(used, "t5")["rank"][0].settings == {"length_normalise": True}
    with pytest.raises(ValueError, match="--data and --out: needed by --beside"):
        Settings.of(checkpoint="a", beside=["b"])
    with pytest.raises(ValueError, match="--candidates: only used with --datasets"):
        Settings.of(beside=["b"], candidates="c.txt", **given)
    with pytest.raises(ValueError, match="--mode: only used with --datasets or --beside"):
        Settings.of(mode="rank", **given)
    with pytest.raises(ValueError, match="--no_baselines: only used without --datasets and"):
        Settings.of(beside=["b"], no_baselines=True, **given)
    with pytest.raises(ValueError, match="--template: not used with --beside"):
        Settings.of(datasets="gqa", beside=["b"], template="v1", **given)
    with pytest.raises(ValueError, match="beside is 'b', expected a list of checkpoints"):
        Settings.of(datasets="gqa", beside="b", **given)


def test_a_first_stage_answers_nothing(bases, data, tmp_path, monkeypatch, capsys):
    class Stage:
        llm = ""

    monkeypatch.setattr(beside.Model, "of", lambda *args: Stage())
    assert main(words(bases, data, tmp_path / "out", "--datasets", "gqa")) == 1
    assert "is a first stage of BLIP-2, which answers nothing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
