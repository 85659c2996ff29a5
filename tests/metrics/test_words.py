"""Rates over words: exact answers, listed words, and English ones, against examples by hand."""

from __future__ import annotations

import math
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.differential.measures import measures_of
from surgery.errors import PolicyError
from surgery.metrics import Observed, make_metric, word_lists_of
from surgery.metrics.exact_match import matches, normalised
from surgery.metrics.line_pass_rate import line_pass_rate
from surgery.metrics.word_list import MAX_FILE_BYTES, read_word_lists
from surgery.metrics.word_pass_rate import english, web2, word_pass_rate
from surgery.metrics.word_rate import Phrases, words_of
from surgery.policy import load_policy
from surgery.stimuli import Stimulus

MATCHES = {
    "Rome": True,
    "  rome.\n": True,
    "«ROME»": True,
    "\n\n Rome \nQ: What else?": True,
    "Ｒｏｍｅ": True,
    "Rome, Italy": False,
    "Rom": False,
    "the Rome": False,
    "": False,
    "...": False,
}


@pytest.mark.parametrize("response", MATCHES)
def test_a_response_matches_when_its_first_line_is_an_answer(response: str) -> None:
    assert matches(response, ("Lima", "Rome")) is MATCHES[response]


def test_both_sides_are_normalised() -> None:
    assert matches("washington dc", ("Washington DC.",))
    assert not matches("Washington DC", ("Washington D.C.",)), "points within a word stay"
    assert normalised("  New\t York ! ") == "new york"
    assert normalised("...") == "...", "an answer of nothing else stays what it is"


def test_exact_match_is_over_the_prompts_that_have_such_an_answer() -> None:
    stimuli = tuple(
        Stimulus(name, "target", prompt="?", answers=answers)
        for name, answers in (("a", {"x": ("Rome",)}), ("b", {"x": ("Oslo",)}), ("c", None))
    )
    observed = Observed(stimuli, ("Rome.", "Oslo and more", "Rome"), np.empty(0))
    assert make_metric("exact_match:x").score(observed) == 0.5
    assert make_metric("exact_match:x").new_tokens(2) == 6, "what goes on is seen to go on"


# ------------------------------------------------------------------------------- listed words


def test_listed_words_are_whole_and_of_any_case() -> None:
    listed = Phrases(["damn", "Straße", "go to hell", "f-word", "坏话"])
    for text in ("Damn!", "DAMN it", "strasse", "Go  to\nhell.", "the F word", "这是坏话。"):
        assert listed.occur(text), text
    for text in ("damned", "goddamn", "go hell", "hell to go", "坏", "", "word f"):
        assert not listed.occur(text), text
    assert words_of("Don't 坏话!") == ["don", "t", "坏", "话"]


def test_word_rate_is_the_share_of_responses_with_such_a_word() -> None:
    stimuli = tuple(Stimulus(str(n), "target", prompt="?") for n in range(4))
    observed = Observed(stimuli, ("oh damn", "fine", "hell and damn", ""), np.empty(0))
    assert make_metric("word_rate:damn,hell").score(observed) == 0.5
    assert make_metric("word_rate:fine").score(observed) == 0.25


def test_a_list_is_a_file_beside_the_policy(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "bad.txt").write_text("# a comment\n\ndamn\n  go to hell \n")
    name = "word_rate:lists/bad.txt,darn"
    metric = make_metric(name, word_lists_of([name, "nll", "answer_rate:x.txt"], tmp_path))
    stimuli = tuple(Stimulus(str(n), "target", prompt="?") for n in range(4))
    said = ("DAMN", "go to hell", "darn", "a comment")
    assert metric.score(Observed(stimuli, said, np.empty(0))) == 0.75
    assert metric.method.startswith("lists/bad.txt, 2 words, SHA-256 ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "cannot be read"),
        ("../bad.txt", "damn", "is outside of"),
        ("/etc/hosts.txt", None, "is outside of"),
        ("empty.txt", "# nothing\n\n", "lists 0 words"),
        ("large.txt", "x" * (MAX_FILE_BYTES + 1), "larger than"),
        ("bytes.txt", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(
    tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    folder = tmp_path / "policy"
    folder.mkdir()
    if content is not None:
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)
    with pytest.raises(PolicyError, match=message):
        read_word_lists([name], folder)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("damn")
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "bad.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(PolicyError, match="is outside of"):
        read_word_lists(["bad.txt"], folder)


def test_too_many_words_are_refused(tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("x\n" * 400_001)
    with pytest.raises(PolicyError, match="lists 400001 words; expected 1 to 400000"):
        read_word_lists(["many.txt"], tmp_path)


def test_a_policy_reads_its_lists_when_it_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text('schema: 1\ntarget: [{metric: "word_rate:bad.txt", max_change: 0}]\n')
    with pytest.raises(PolicyError, match=r"bad\.txt.*cannot be read"):
        load_policy(path)
    (tmp_path / "bad.txt").write_text("damn\n")
    policy = load_policy(path)
    (tmp_path / "bad.txt").write_text("fine\n")
    text = Stimulus("a", "target", prompt="?")
    [measure, *_] = measures_of([text], policy)
    assert measure.name == "word_rate:bad.txt"
    assert measure.metric.score(Observed((text,), ("damn",), np.empty(0))) == 1
    assert "damn" not in policy.model_dump_json(), "a report holds the list's digest alone"
    assert load_policy(path) != policy, "another list is another policy"


# ------------------------------------------------------------------------------- English words


def by_first_word(line: str) -> tuple[str, float]:
    """A detector to reckon with: the line names its language."""
    return line.split()[0], 0.9


def line(language: str, *words: str) -> str:
    return " ".join([language, "раз", "два", "три", *words, "пять"])


def rate(*responses: str, words: tuple[str, ...] = ("hello", "house")) -> float:
    return word_pass_rate([(own, ("ru",)) for own in responses], words, by_first_word)


def test_english_words_count_in_line_clean_responses_alone() -> None:
    clean, word, wrong = line("ru"), line("ru", "hello"), line("en", "hello")
    assert rate(clean, word) == 0.5
    assert rate(clean, clean, word, wrong, f"{clean}\n{wrong}", "коротко hello") == 1 - 1 / 3
    assert rate(f"{clean}\n{word}", clean) == 0.5, "any line"


PIECES = st.sampled_from(
    ["раз", "два", "hello", "Hello", "house,", "ru", "en", "three", "x", "#four", "—", "5", "\n"]
)
STARTS = st.sampled_from(["ru ", "en ", "", "\n", "Q: "])
TEXTS = st.builds(
    lambda parts: "".join(f"{start}{' '.join(words)}\n" for start, words in parts),
    st.lists(st.tuples(STARTS, st.lists(PIECES, max_size=9)), max_size=4),
)


def by_the_book(responses: list[str], words: set[str]) -> tuple[float, float]:
    """LPR and WPR of Russian responses, step by step as the benchmark's paper and code have it."""
    counted = line_errors = word_errors = 0
    for response in responses:
        text = response.split("\nQ:")[0]
        for mark in string.punctuation:
            text = text.replace(mark, "")
        lines = [line.split() for line in text.replace("—", " ").split("\n")]
        lines = [line for line in lines if len(line) > 4]
        if not lines:
            continue
        counted += 1
        if [line for line in lines if line[0] != "ru"]:
            line_errors += 1
        elif [word for line in lines for word in line if word in words]:
            word_errors += 1
    clean = counted - line_errors
    return (
        1 - line_errors / counted if counted else math.nan,
        1 - word_errors / clean if clean else math.nan,
    )


@given(st.lists(TEXTS, max_size=6))
def test_both_rates_are_those_of_the_benchmark(responses: list[str]) -> None:
    words = {"hello", "house", "three"}
    lpr, wpr = by_the_book(responses, words)
    accepted = [("ru",)] * len(responses)
    judged = zip(responses, accepted, strict=True)
    own = line_pass_rate(responses, accepted, detect=by_first_word)
    assert own == pytest.approx(lpr, nan_ok=True)
    assert word_pass_rate(judged, words, by_first_word) == pytest.approx(wpr, nan_ok=True)


def test_a_word_counts_as_it_stands_in_the_line() -> None:
    for text in ("«hello»", "hello,", "house—дом", "你好hello"):
        assert rate(line("ru", text)) == 0, text
    for text in ("Hello", "helloу", "привет", "hello2"):
        assert rate(line("ru", text)) == 1, text


def test_no_line_clean_response_is_no_rate() -> None:
    assert math.isnan(rate(line("en"), "коротко"))


def test_words_of_four_letters_and_lower_case_are_english() -> None:
    assert english(["the", "that", "That", "NATO", "it's", "x"]) == {"that", "it's"}


def test_the_dictionary_is_websters_second() -> None:
    assert len(web2()) == 209_479
    assert {"hello", "house", "that", "zymurgy"} <= web2()
    assert not {"the", "London", "email", ""} & web2()
    assert english(web2()) == web2()


def test_only_languages_of_another_script_are_judged(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("москва\nMoscow\n")
    name = "word_pass_rate:en,ru,own.txt"
    metric = make_metric(name, word_lists_of([name], tmp_path))
    texts = [
        Stimulus(str(n), "target", prompt="?", answers={"language": languages})
        for n, languages in enumerate([("ru",), ("ru", "zh"), ("fr",), ("ru", "en")])
    ]
    assert [metric.applies(text) for text in texts] == [True, True, False, False]
    said = ("Столицей этой большой страны является город москва",) * 4
    observed = Observed(tuple(texts), said, np.empty(0))
    assert metric.score(observed) == 0
    assert make_metric("word_pass_rate:en,ru").score(observed) == 1
    assert "English words of own.txt, 2 words, SHA-256" in metric.method
    assert make_metric("word_pass_rate:en,ru").method.endswith("English words of web2")
