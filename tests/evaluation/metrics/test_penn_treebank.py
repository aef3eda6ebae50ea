import json
import shutil

import pytest

from jax_instructblip.evaluation.metrics.caption_scores import tokenise_stanford
from jax_instructblip.evaluation.metrics.penn_treebank import tokenise

# As PTBTokenizer 3.4.1 with -lowerCase writes them, without punctuation.
CASES = {
    "A close-up picture of a toilet.": "a close-up picture of a toilet",
    "It's the men's room, isn't it?": "it 's the men 's room is n't it",
    "the dogs' toys": "the dogs toys",
    "He can't. He cannot! He won\u2019t": "he ca n't he can not he wo n't",
    "I'm gonna say they've 'tis \u201cgood\u201d": "i 'm gon na say they 've 't is good",
    "tub/shower w/o and/or a/b/c": "tub/shower w/o and/or a/b/c",
    "at 5:54pm, 11:44. 1,000.50 or $5": "at 5:54 pm 11:44 1,000.50 or $ 5",
    "8th ave. and 22 3/4 st.": "8th ave. and 22\u00a03/4 st.",
    "Mr. Smith of St. Louis in the u.s. at 3 p.m.": "mr. smith of st. louis in the u.s. at 3 p.m.",
    "in Wash. by the car wash. No. 5, no. A": "in wash. by the car wash no. 5 no a",
    "12th Ave S. The end": "12th ave s the end",
    "12th Ave S. and": "12th ave s. and",
    "(a) [b] {c} :)": "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb- :-rrb-",
    "black & white; A&amp;M a &amp; b": "black & white a&m a & b",
    "what?! ok!! hi... -- - \u2013 ?": "what ?! ok !! hi",
    "Hawai'i, O'Reilly, rock 'n' roll, o'clock": "hawai'i o'reilly rock 'n' roll o'clock",
    "hello.world www.foo.com/bar a@b.com <br/>": "hello.world www.foo.com/bar a@b.com <br/>",
    "5% of 1/2, #1 #one x_y ____": "5 % of 1/2 # 1 #one x_y ____",
    "caf\u00e9 \u65e5\u672c\u8a9e \u00a35": "caf\u00e9 \u65e5\u672c\u8a9e # 5",
    "two\nlines\u2028and\tmore": "two lines and more",
    "": "",
    "...": "",
}


@pytest.fixture(scope="module")
def stanford():
    """The original; needs Java and the caption tools."""
    pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap: pip install -e .[eval]")
    if shutil.which("java") is None:
        pytest.skip("needs Java")
    return tokenise_stanford


@pytest.mark.parametrize("caption", CASES)
def test_cases(caption):
    assert tokenise([caption]) == [CASES[caption]]


def test_cases_are_those_of_the_original(stanford):
    assert stanford(list(CASES)) == list(CASES.values())


def test_what_follows_decides_about_a_single_letter(stanford):
    captions = ["on S.", "A dog", "on S.", "Dogs"]
    assert tokenise(captions) == stanford(captions) == ["on s", "a dog", "on s.", "dogs"]


def test_recorded_tokens(shared):
    path = shared / "data" / "captioning" / "coco-caption" / "ptb_tokenizer_cases.json"
    cases = json.loads(path.read_text())
    assert tokenise([case["caption"] for case in cases]) == [case["ptb"] for case in cases]
    assert len(cases) == 400


def test_every_caption_of_coco_val2017(stanford, shared):
    path = shared / "data" / "captioning" / "captions_val2017.json"
    captions = [each["caption"] for each in json.loads(path.read_text())["annotations"]]
    found, expected = tokenise(captions), stanford(captions)
    assert [
        pair for pair in zip(captions, found, expected, strict=True) if pair[1] != pair[2]
    ] == []
    assert len(captions) == 25_014


def test_questions_and_answers_come_close(stanford, shared):
    """They are no captions: telephone numbers, addresses, formulas."""
    folder = shared / "data" / "vqa" / "textvqa"
    rows = json.loads((folder / "val_annotations_vqa_format.json").read_text())["annotations"]
    texts = list(dict.fromkeys(each["answer"] for row in rows for each in row["answers"]))
    pairs = list(zip(tokenise(texts), stanford(texts), strict=True))
    assert sum(ours != theirs for ours, theirs in pairs) / len(pairs) < 0.002
