"""Text normalisation of the VQA tools for short answers, including their bugs.

https://github.com/GT-Vision-Lab/VQA (vqaEval.py). Published scores depend on it, so it is
reproduced exactly. Two bugs: whether a punctuation mark is deleted or replaced by a space depends
on other places in the text (`strip_punctuation`); and contractions in the table that contain
capitals are never matched, because the text is in lower case.
"""

import re

_PUNCTUATION = (*';/[]"{}()=+\\_-><@`,?!',)
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
# The tools pass re.UNICODE (32) as `count` of `re.sub`: at most 32 full stops are removed.
_MOST_FULL_STOPS = 32

_NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"},
    **{"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_ARTICLES = ("a", "an", "the")
_CONTRACTION_LIST = (
    "aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't "
    "couldn'tve=couldn't've couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't "
    "hadnt=hadn't hadnt've=hadn't've hadn'tve=hadn't've hasnt=hasn't havent=haven't hed=he'd "
    "hed've=he'd've he'dve=he'd've hes=he's howd=how'd howll=how'll hows=how's Id've=I'd've "
    "I'dve=I'd've Im=I'm Ive=I've isnt=isn't itd=it'd itd've=it'd've it'dve=it'd've itll=it'll "
    "let's=let's maam=ma'am mightnt=mightn't mightnt've=mightn't've mightn'tve=mightn't've "
    "mightve=might've mustnt=mustn't mustve=must've neednt=needn't notve=not've oclock=o'clock "
    "oughtnt=oughtn't ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't "
    "shed've=she'd've she'dve=she'd've she's=she's shouldve=should've shouldnt=shouldn't "
    "shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd "
    "somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll "
    "somebodys=somebody's someoned=someone'd someoned've=someone'd've someone'dve=someone'd've "
    "someonell=someone'll someones=someone's somethingd=something'd "
    "somethingd've=something'd've something'dve=something'd've somethingll=something'll "
    "thats=that's thered=there'd thered've=there'd've there'dve=there'd've therere=there're "
    "theres=there's theyd=they'd theyd've=they'd've they'dve=they'd've theyll=they'll "
    "theyre=they're theyve=they've twas='twas wasnt=wasn't wed've=we'd've we'dve=we'd've "
    "weve=we've werent=weren't whatll=what'll whatre=what're whats=what's whatve=what've "
    "whens=when's whered=where'd wheres=where's whereve=where've whod=who'd whod've=who'd've "
    "who'dve=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're whys=why's "
    "wont=won't wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've wouldn'tve=wouldn't've "
    "yall=y'all yall'll=y'all'll y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've "
    "y'all'dve=y'all'd've youd=you'd youd've=you'd've you'dve=you'd've youll=you'll "
    "youre=you're youve=you've"
)
_CONTRACTIONS: dict[str, str] = {
    wrong: right for wrong, _, right in (pair.partition("=") for pair in _CONTRACTION_LIST.split())
}


def flatten(text: str) -> str:
    """Returns `text` on one line, stripped of outer white space."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """Returns `text` without punctuation: "2 dogs." -> "2 dogs", "blue/green" -> "blue green".

    A mark becomes a space; but all its occurrences are deleted if one of them touches a space, or
    if the text has a number with a comma. Apostrophes, colons and full stops before a digit are
    kept.
    """
    stripped = text
    number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        outer = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if outer or number else " ")
    return _FULL_STOP.sub("", stripped, count=_MOST_FULL_STOPS)


def unify_words(text: str) -> str:
    """Returns `text` in lower case, numbers as digits, no articles: "the two dogs" -> "2 dogs".

    Contractions get their apostrophe: "dont" -> "don't".
    """
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalise(text: str) -> str:
    """Returns `text` after `flatten`, `strip_punctuation` and `unify_words`.

    LAVIS compares answers of GQA, MSVD-QA and MSRVTT-QA in this form.
    """
    return unify_words(strip_punctuation(flatten(text)))


def normalise_evalai(text: str) -> str:
    """Returns `text` as EvalAI and TextVQA's scorer (MMF) normalise it.

    Before `normalise`, commas and question marks are removed and "men's" becomes "men 's".
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise(text.strip())
