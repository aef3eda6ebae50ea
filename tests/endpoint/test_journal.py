"""The journal of replies: exact after a kill, and refused if it belongs to other requests."""

import json

import pytest

from jax_instructblip.endpoint.journal import Request, open_journal

FACTS = {"model": "m", "prompts": {"a": "1"}}


def request(name, text="?"):
    return Request(name, ({"role": "user", "content": text},))


@pytest.fixture
def path(tmp_path):
    """A journal with a bad and a good reply to `a`, and a bad one to `b`."""
    path = tmp_path / "new" / "j.jsonl"
    with open_journal(path, FACTS) as journal:
        journal.add(request("a"), "bad", "no form", 5)
        journal.add(request("a"), "gut é\ud800", "", 7)
        journal.add(request("b"), "", "empty", 1)
    return path


def test_what_was_added_is_read_again(path):
    with open_journal(path, FACTS) as journal:
        journal.check([request("a"), request("b"), request("c")])
        assert journal.answers == {"a": "gut é\ud800"}
        assert journal.failures == {"a": 1, "b": 1} and journal.tokens == 13
        assert journal.problems["b"] == "empty"


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_that_a_kill_cut_short_is_dropped_and_written_again(path, cut):
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with open_journal(path, FACTS) as journal:
        assert journal.answers.keys() == {"a"} and journal.failures == {"a": 1}
        journal.add(request("b"), "", "empty", 1)
    assert path.read_bytes() == whole


def test_a_first_line_that_was_cut_short_is_written_again(path):
    first = path.read_bytes().partition(b"\n")[0]
    path.write_bytes(first[:20])
    with open_journal(path, FACTS) as journal:
        assert not journal.answers
    assert path.read_bytes() == first + b"\n"


@pytest.mark.parametrize("content", [b"notes without a line end", b"a: 1\nnotes", b"\xff\x00"])
def test_a_file_of_something_else_is_refused_and_unchanged(tmp_path, content):
    path = tmp_path / "j.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is no journal of requests: choose another --out"):
        with open_journal(path, FACTS):
            pass
    assert path.read_bytes() == content


def test_a_journal_of_other_prompts_or_settings_is_refused_and_unchanged(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="(?s)model was 'm', now 'n'.*prompts was.*another --out"):
        with open_journal(path, {"model": "n", "prompts": {"a": "2"}}):
            pass
    assert path.read_bytes() == before


def test_a_journal_of_other_requests_is_refused(path):
    with open_journal(path, FACTS) as journal:
        with pytest.raises(ValueError, match="1 replies are to requests that are not made.*'b'"):
            journal.check([request("a")])
        with pytest.raises(ValueError, match="1 replies are to requests with other mess.*'a'"):
            journal.check([request("a", "??"), request("b")])


def test_two_processes_do_not_share_a_journal(path):
    with open_journal(path, FACTS):
        with pytest.raises(ValueError, match="another process writes to"):
            with open_journal(path, FACTS):
                pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines, lines[2]], "j.jsonl:5: 'a' is answered twice"),
        (lambda lines: [*lines, {**lines[3], "digest": "0"}], ":5: 'b' stands for two different"),
        (lambda lines: [lines[0], {"id": "a"}], ":2: expected an object with id, digest, text"),
        (lambda lines: [lines[0], {**lines[1], "tokens": "5"}], ":2: tokens is text, expected a w"),
        (lambda lines: [{"question": "?"}], "is no journal of requests"),
        (lambda lines: [{**lines[0], "journal": 2}], "version 2, this program reads 1"),
    ],
)
def test_a_damaged_journal_is_refused_by_line(path, change, message):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))
    with pytest.raises(ValueError, match=message):
        with open_journal(path, FACTS):
            pass
