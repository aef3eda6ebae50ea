import html.parser

from PIL import Image

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.families import Prediction
from jax_instructblip.evaluation.report import GRID, write_report


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


def samples(count):
    image = Image.new("RGB", (20, 20), (0, 90, 0))
    record = Record("a", (image,), "is 1 < 2 & 'x'?", ("yes", "yes", "sure"), task="logic")
    wrong = Prediction("a", "logic", record.prompt, "<b>no</b>", record.answers, -1.25, False)
    return [(record, wrong)] * count


SCORES = {
    "count": 2,
    "mean": {"tuned": 0.5, "majority": 0.25, "blind": 0.125},
    "tasks": {"logic": {"count": 2, "tuned": 0.5, "majority": 0.25, "blind": 0.125}},
}


def test_a_page_without_anything_from_elsewhere(tmp_path):
    path = tmp_path / "report.html"
    metrics = [
        {"step": 0, "validation/accuracy": 0.1},
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "validation/accuracy": 0.5},
    ]
    write_report(
        path,
        title="a < b",
        splits={"test": SCORES},
        samples={"test": samples(3)},
        metrics=metrics,
        facts={"checkpoint": "runs/x"},
    )
    page = Page(path.read_text())
    text = " ".join(page.words)
    for part in ("a < b", "runs/x", "is 1 < 2 & 'x'?", "answer: <b>no</b>", "truth: yes / sure"):
        assert part in text, part
    for part in ("50.0%", "25.0%", "12.5%", "mean of the families", "logic, log-probability -1.25"):
        assert part in text, part
    assert "before" not in text  # no such column was measured
    assert len(page.pictures) == 1 + 3  # the curves and the grid


def test_shows_some_of_many_and_no_curve_without_metrics(tmp_path):
    write_report(
        tmp_path / "r.html", title="t", splits={"test": SCORES}, samples={"test": samples(99)}
    )
    page = Page((tmp_path / "r.html").read_text())
    assert len(page.pictures) == GRID
    assert "Training" not in " ".join(page.words)


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    record, prediction = samples(1)[0]
    broken = Record("b", ("/nowhere.png",), record.prompt, ("x",))
    write_report(
        tmp_path / "r.html",
        title="t",
        splits={"test": SCORES},
        samples={"test": [(broken, prediction)]},
    )
    assert "/nowhere.png" in (tmp_path / "r.html").read_text()
