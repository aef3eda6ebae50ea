import shutil
import subprocess

import pytest
from PIL import Image

from jax_instructblip.evaluation.benchmark_report import SHOWN, line, markdown, write_html
from jax_instructblip.evaluation.benchmarks import PAPER
from jax_instructblip.evaluation.stored import Row
from tests.evaluation.parrots import record
from tests.evaluation.test_report import Page

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
    "values": {"cider": 118.25, "mean_rank": 1.5},
    "unscored": "",
    "left_out": {"meteor": "it needs Java"},
    "paper": PAPER["nocaps"],
    "paper_model": "instructblip-flan-t5-xl",
    "gap": -1.65,
    "prompts_cut_for_the_qformer": 3,
    "problems": [f"r{n}: no image" for n in range(12)],
    "notes": ["a note & more"],
}
BARE = RESULT | {
    **{"unscored": "no tools", "value": None, "values": {}, "gap": None, "metric": ""},
    **{"left_out": {}, "problems": [], "paper": {}, "candidates": {"count": 9}},
}
RESULTS = {"nocaps": RESULT, "gqa": BARE}
ROWS = [
    Row(
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

    hidden = [Row("h1", "why?", problem="it is dark"), Row("h2", "why?", "so")]
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
    assert "- meteor is left out: it needs Java" in text and "| mean_rank | 1.50 |" in text
    assert "- could not be asked: 12, which count as wrong" in text


def test_one_line_a_dataset():
    assert line("nocaps", RESULT) == (
        "nocaps: cider 118.25 (40 records, 12 could not be asked), paper 119.9 (FlanT5-XL), "
        "gap -1.65\n  meteor is left out: it needs Java"
    )
    assert line("gqa", BARE) == "gqa: NOT SCORED, no tools"


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


def browse(path, folder):
    """What the browser prints of a page, and its picture."""
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
