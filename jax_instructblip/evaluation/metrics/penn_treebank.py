"""Splits captions into Penn Treebank tokens without Java, as CIDEr and related metrics need them.

Caption scores are defined on the tokens of Stanford's PTBTokenizer 3.4.1, a Java program, without
punctuation. This module reproduces its output on captions; the tests compare it with recorded
output. On other text (numbers glued to words, addresses, chat) a few lines in a thousand differ.

At each position the rule with the longest match applies, the first one on a tie.
"""

import re
from collections.abc import Callable, Iterator, Sequence

# Abbreviations, whose full stop is part of the token.
_ABBREVIATIONS = (
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri "
    "adj adm adv asst assoc atty attys brig capt cmdr col comdr cpl det dr drs ens esq gen gov "
    "govs hon insp jr lieut lt maj messrs mlle mme mr mrs ms msgr mt pfc pres prof profs pvt rep "
    "reps rev sen sens sfc sgt spc sr st ste supt supts ave bldg blvd ft rd sq "
    "assn bancorp bhd bros cie co corp cos ct dept est inc ind intl ltd natl ph plc pt rt sys tel "
    "univ al cf etc vs "
    "ala ariz calif colo conn dak fla ga kan kans ky md mich minn mo mont neb nev okla penn tenn "
    "va vt wis wisc wyo"
)
_CAPITALISED = "ark az del ill la mass miss ore pa tex wash"  # "in Wash.", but "a car wash."
_NUMBERED = "ca fig no nos op pp prop"  # "no. 5"
# Words that begin a sentence: a full stop between a single letter and one of them ends a sentence.
_STARTS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last "
    r"Many More Mr\. Ms\. Now Once One Other Our She Since So Some Such That The Their Then There "
    "These They This We What When While Yet You"
)
_ENTITIES = {"amp": ["&"], "lt": ["<"], "gt": [">"], "quot": [], "apos": [], "nbsp": []}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

_CURRENCIES = {"\u00a3": "#", "\u20ac": "$", "\u00a2": "cents"}

_LETTER, _ALNUM, _APOSTROPHE = r"[^\W\d_]", r"[^\W_]", r"['\u2019]"

Action = Callable[[re.Match[str]], list[str]]  # the tokens that a match stands for


def tokenise(captions: Sequence[str]) -> list[str]:
    """Returns the tokens of each caption, in lower case, without punctuation, joined by spaces.

    All white space, including line breaks, separates words. The order of captions matters in one
    rare case, as in the original: if a caption ends in a single letter with a full stop, the start
    of the next caption decides whether the stop belongs to the letter.
    """
    text = "\n".join(" ".join(caption.split()) for caption in captions)
    lines: list[list[str]] = [[]]
    position = 0
    while position < len(text):
        if text[position] == "\n":
            lines.append([])
        if text[position] in " \n":
            position += 1
            continue
        # Rules compete by the length of the whole match, even past the last group.
        matches = [
            (match, action) for rule, action in _RULES if (match := rule.match(text, position))
        ]
        match, action = max(matches, key=lambda pair: pair[0].end())
        lines[-1] += action(match)
        position = match.end(match.lastindex) if match.lastindex else match.end()
    return [" ".join(line).lower() for line in lines[: len(captions)]]


def _keep(match: re.Match[str]) -> list[str]:
    return [match[0]]


def _straight(match: re.Match[str]) -> list[str]:
    return [match[0].replace("\u2019", "'")]


def _drop(match: re.Match[str]) -> list[str]:
    del match
    return []


def _parts(match: re.Match[str]) -> list[str]:
    return [part for part in match.groups() if part]


def _entity(match: re.Match[str]) -> list[str]:
    return _ENTITIES[match[0][1:-1].lower()]


def _company(match: re.Match[str]) -> list[str]:
    return [match[0].replace("&amp;", "&")]


def _fraction(match: re.Match[str]) -> list[str]:
    return [match[0].replace(" ", "\u00a0")]  # "22 3/4" is one token


def _brackets(match: re.Match[str]) -> list[str]:
    return ["".join(_BRACKETS.get(mark, mark) for mark in match[0])]


def _currency(match: re.Match[str]) -> list[str]:
    return [_CURRENCIES[match[0]]]


def _rules() -> Iterator[tuple[str, Action, int]]:
    """Yields each rule: a regex pattern, a function from its match to tokens, and regex flags.

    After a match, reading continues after its last group, or after the match if it has no group.
    """
    ap = _APOSTROPHE
    yield r"&(?:amp|lt|gt|quot|apos|nbsp);", _entity, re.I
    yield r"</?[a-z!?][^<>\n]*>", _keep, re.I
    yield r"https?://[^\s<>\"|(){}]+[^\s<>\"|(){}\[\].,;:!?'-]", _keep, re.I
    host = r"(?:[a-z0-9][-a-z0-9]*\.)+"
    yield rf"(?:www\.{host}[a-z]{{2,4}}|{host}(?:com|net|org|edu))(?!{_ALNUM})", _keep, re.I
    yield rf"{host}(?:com|net|org|edu)/[^\s<>\"']*[^\s<>\"'.,?!]", _keep, re.I
    yield r"[a-z0-9][^\s<>\"()|@]*@(?:[^\s<>\"()|.:@]+\.)*[^\s<>\"()|.:@]+", _keep, re.I
    yield r"[@#][a-z_]\w*", _keep, re.I
    yield r"(can)(not)|(gon)(na)|(got)(ta)|(wan)(na)|(lem)(me)|(gim)(me)", _parts, re.I
    yield rf"({ap}t)(is|was)", _parts, re.I
    # Contractions; the n of n't leaves the word.
    yield rf"([a-z]*[a-mo-z])n{ap}t(?!{_LETTER})", _parts, re.I
    yield rf"(?:n{ap}t|{ap}(?:[msd]|re|ve|ll))(?!{_LETTER})", _straight, re.I
    yield rf"(?:[ldj]|dunkin|somethin|ol|y){ap}", _keep, re.I
    yield rf"{ap}(?:n{ap}?|em|til|cause|[2-9]0s)(?!{_ALNUM})|c{ap}mon", _keep, re.I
    # Words, including marks inside them.
    yield rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*", _keep, re.I
    name = rf"(?:[dlno]{ap}(?={_LETTER}{{2}}))?{_ALNUM}+"  # d'art, O'Reilly
    yield rf"{name}(?:[-_]{name})*", _keep, re.I
    slashed = r"[a-z0-9]+(?:-[a-z]+){0,2}"
    yield rf"{slashed}(?:/{slashed}){{1,2}}", _keep, re.I
    yield r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+", _company, 0
    yield rf"{_LETTER}+[aeiouy]{ap}[aeiou]{_ALNUM}*", _keep, re.I  # Hawai'i
    # A full stop that belongs to its word.
    yield rf"(?:{_either(_ABBREVIATIONS)})\.", _keep, re.I
    yield rf"(?:{_either(_CAPITALISED.title())}|{_either(_CAPITALISED.upper())})\.", _keep, 0
    yield rf"((?:{_either(_NUMBERED)})\.)\s?\d", _parts, re.I
    yield r"[a-z](?:\.[a-z])*\.|ph\.d\.?", _keep, re.I
    yield rf"([A-Za-z])\.\s(?:{_either(_STARTS)})(?=\s)", _parts, 0
    # Numbers and times, fractions, dates.
    yield r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)", _keep, 0
    yield r"(?:\d{1,4}[- ])?\d{1,4}/\d{1,4}", _fraction, 0
    yield r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", _keep, 0
    # Marks.
    yield r"[\u00a2\u00a3\u20ac]", _currency, 0
    yield r"[:;]-?[()]|[()\[\]{}]", _brackets, 0
    yield r"\.+|[-\u2013\u2014\u2015]+|[\"'`\u2018\u2019\u201c\u201d\u2026,:;?!]", _drop, 0
    yield r"[?!]{2,}|_+|.", _keep, 0


def _either(words: str) -> str:
    return "|".join(words.split())


_RULES = [(re.compile(pattern, flags), action) for pattern, action, flags in _rules()]
