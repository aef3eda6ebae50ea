from jax_instructblip.data import inspect


def test_histogram_by_hand():
    assert inspect.histogram("answer", [1, 8, 9, 40]) == [
        "answer: 1 to 40 tokens, median 8.5",
        "        1-8        2 ########################################",
        "       9-16        1 ####################",
        "      17-32        0",
        "      33-64        1 ####################",
    ]


def test_brackets_enclose_runs():
    pieces = [("a", False), ("]", True), ("[", True), ("b", False), ("c", True)]
    assert inspect.render(pieces) == "a [] [] b [c]"
