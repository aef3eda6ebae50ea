import html.parser
import shutil
import subprocess

import pytest
from PIL import Image

from jax_instructblip.evaluation.predictions import Prediction
from jax_instructblip.evaluation.protocol import BENCHMARKS
from jax_instructblip.evaluation.reports.report import SHOWN, line, markdown, write_html
from tests.helpers.fake_pipeline import record


class Page(html.parser.HTMLParser):
    """Pictures and text of a page; fails where something is fetched from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.pictures, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        fields = dict(attrs)
        assert tag not in ("link", "script") and "href" not in fields
        if tag == "img":
            assert fields["src"].startswith("data:image/")
            self.pictures.append(fields)

    def handle_data(self, data):
        self.words.append(data)


MODEL = {"checkpoint": "runs/<x>", "weights": "abc", "dtype": "bfloat16"}
RESULT = {
    "dataset": "nocaps",
    "split": "val",
    "mode": "generated",
    "prompt": "A short | description.",
    "settings": {"num_beams": 5},
    "batch_size": 8,
    "count": 40,
    "metric": "cider",
    "value": 118.25,
    "standard_error": 1.5,
    "standard_errors": {"cider": 1.5},
    "values": {"cider": 118.25, "mean_rank": 1.5},
    "unscored": "",
    "left_out": {"meteor": "it needs Java"},
    "paper": BENCHMARKS["nocaps"].paper,
    "paper_model": "instructblip-flan-t5-xl",
    "gap": -1.65,
    "prompts_cut_for_the_qformer": 3,
    "problems": [f"r{n}: no image" for n in range(12)],
    "notes": ["a note & more"],
}
BARE = RESULT | {
    **{
        "unscored": "no tools",
        "value": None,
        "standard_error": None,
        "values": {},
        "gap": None,
        "metric": "",
    },
    **{"left_out": {}, "problems": [], "paper": {}, "candidates": {"count": 9}},
}
RESULTS = {"nocaps": RESULT, "gqa": BARE}
ROWS = [
    Prediction(
        f"r{n}",
        "<what>?",
        "a cup",
        score=n % 4 / 2,
        answers=("a cup", "cups"),
        candidates=("a cup", "no"),
        scores=(-1.0, -0.25),
    )
    for n in range(40)
]


def written(path):
    def opened(number):
        return record(number, images=(Image.new("RGB", (80, 80), (number, 90, 0)),))

    hidden = [Prediction("h1", "why?", problem="it is dark"), Prediction("h2", "why?", "so")]
    samples = {"nocaps": (opened, ROWS), "gqa": (opened, hidden)}
    write_html(path, MODEL, RESULTS, samples)
    return Page(path.read_text())


def test_our_numbers_stand_beside_the_papers(tmp_path):
    page = written(tmp_path / "report.html")
    text = " ".join(page.words)
    for part in ("runs/<x>", "118.2", "119.9", "120.0", "123.1", "121.9", "-1.6", "a note & more"):
        assert part in text, part
    for part in ("num_beams 5", "meteor is left out it needs Java", "12, which count as wrong"):
        assert part in text, part
    for part in ("not scored", "no tools", "r9: no image", "and 2 more", "answer: it is dark"):
        assert part in text, part
    for part in ("<what>?", "truth: a cup / cups", "no -0.25, a cup -1.00", "end of 3 prompts"):
        assert part in text, part
    assert "r10: no image" not in text
    assert len(page.pictures) == 2 * SHOWN + 2
    html = (tmp_path / "report.html").read_text()
    assert html.count("card right") == html.count("card wrong") == SHOWN


def test_the_same_as_markdown():
    text = markdown(MODEL, RESULTS)
    row = next(each for each in text.splitlines() if each.startswith("| nocaps"))
    assert row == "| nocaps | val | 40 | cider | 118.2 | 119.9 | 120.0 | 123.1 | 121.9 | -1.6 |"
    assert "| gqa | val | 40 | - | not scored | - | - | - | - | - |" in text
    assert "- meteor is left out: it needs Java" in text and "| mean_rank | 1.50 | - |" in text
    assert "| cider | 118.25 | 1.50 |" in text
    assert "- could not be asked: 12, which count as wrong" in text


def test_one_line_a_dataset():
    assert line("nocaps", RESULT) == (
        "nocaps: cider 118.25 (40 records, standard error 1.50, 12 could not be asked), "
        "paper 119.9 (FlanT5-XL), gap -1.65\n  meteor is left out: it needs Java"
    )
    assert line("gqa", BARE) == "gqa: NOT SCORED, no tools"


FAMILIES = BARE | {
    **{"unscored": "", "metric": "accuracy", "value": 50.0, "count": 2, "standard_error": 2.5},
    **{"values": {"accuracy": 50.0, "accuracy/logic": 50.0}, "families": {"logic": 2}},
    "baselines": {
        "majority": {"accuracy": 25.0, "accuracy/logic": 25.0},
        "blind": {"accuracy": 12.5, "accuracy/logic": 12.5},
    },
}


def families_page(path, count, metrics=(), image=None):
    image = image or Image.new("RGB", (20, 20), (0, 90, 0))
    answers = ("yes", "yes", "sure")
    rows = [
        Prediction(
            *(f"r{n}", "is 1 < 2 & 'x'?", "<b>no</b>"),
            task="logic",
            answers=answers,
            logprob=-1.25,
            score=0.0,
        )
        for n in range(count)
    ]
    opened = lambda number: record(number, images=(image,))
    write_html(path, {"checkpoint": "a < b"}, {"test": FAMILIES}, {"test": (opened, rows)}, metrics)
    return Page(path.read_text())


def test_families_stand_beside_their_baselines_under_the_curves(tmp_path):
    metrics = [
        {"step": 0, "validation/score": 0.1},
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "validation/score": 0.5},
    ]
    page = families_page(tmp_path / "report.html", 3, metrics)
    text = " ".join(page.words)
    for part in ("a < b", "is 1 < 2 & 'x'?", "answer: <b>no</b>", "truth: yes / sure", "Training"):
        assert part in text, part
    for part in ("50.0%", "25.0%", "12.5%", "mean of the families", "log-probability -1.25"):
        assert part in text, part
    assert "black images" in text and "before it was tuned" not in text  # not measured
    assert len(page.pictures) == 1 + 3  # the curves and the grid
    assert "| logic | 2 | 50.0% | 12.5% | 25.0% |" in markdown({}, {"test": FAMILIES})


def test_some_of_many_are_shown_and_no_curve_without_metrics(tmp_path):
    page = families_page(tmp_path / "r.html", 99)
    assert len(page.pictures) == SHOWN and "Training" not in " ".join(page.words)


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    families_page(tmp_path / "r.html", 1, image="/nowhere.png")
    assert "/nowhere.png" in (tmp_path / "r.html").read_text()


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


def browse(path, folder):
    """The output of the browser for a page, and its picture."""
    quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [BROWSER, "--headless", "--no-sandbox", *quiet.split(), "--disable-component-update"]
    command += ["--disable-sync", f"--user-data-dir={folder / 'profile'}", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", f"--screenshot={folder / 'page.png'}"]
    done = subprocess.run(
        [*command, "--window-size=1200,1600", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    with Image.open(folder / "page.png") as picture:
        return done.stderr, picture.convert("RGB")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_shows_it_without_a_complaint(tmp_path):
    written(tmp_path / "report.html")
    said, picture = browse(tmp_path / "report.html", tmp_path)
    assert "CONSOLE" not in said
    colors = {color for _, color in picture.getcolors(1 << 24)}
    assert {(0x54, 0xA2, 0x4B), (0xE4, 0x57, 0x56)} <= colors  # the cards' edges
    assert any(abs(g - 90) < 3 and b < 3 for _, g, b in colors)  # their pictures
    (tmp_path / "bad.html").write_text("<script>nothing_of_that_name()</script>")
    assert "CONSOLE" in browse(tmp_path / "bad.html", tmp_path)[0]
