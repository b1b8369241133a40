"""Verifiers: what counts as the right answer, case by case, and GSM8K's own answers against themselves."""

import gzip
import itertools
import json
import os
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest

from lowrank_rlhf.errors import UserError
from lowrank_rlhf.rewards import VERIFIERS
from lowrank_rlhf.rewards.verifiers import exact_match, exact_number, last_number, normalised, pattern

DATA = os.environ.get("LOWRANK_RLHF_DATA")

# (completion, answer, score)
NUMBERS = [
    ("#### 18", "#### 18", 1),
    ("18", "She makes 9 * 2 = $<<9*2=18>>18.\n#### 18", 1),
    ("She makes 9 * 2 = $<<9*2=18>>18.\n#### 18", 18, 1),
    ("#### 81", "#### 18", 0),
    ("", "18", 0),
    ("eighteen", "18", 0),
    ("####", "18", 0),
    # where the number stands
    ("The answer is 18.", "18", 1),
    ("18 of 20 are red", "18", 0),  # the last number, not any
    ("#### 18\n\nChecked: 9 times 2.", "18", 1),  # what follows the line of the mark does not count
    ("#### 18 dollars for 2 days", "18", 1),  # the first number on that line
    ("#### 17\nNo, wait.\n#### 18", "18", 1),  # the last mark
    ("#### 18\nNo, wait.\n#### 17", "18", 0),
    ("18\n#### Answer", "18", 1),  # a heading: the mark has no number on its line
    ("#### Solution\n9 * 2 = 18", "18", 1),
    ("####18", "18", 1),
    ("####\n18", "18", 1),
    ("## 18", "18", 1),
    ("So **18** it is!", "18", 1),
    (r"\boxed{18}", "18", 1),
    ("x1 = 9, x2 = 18, in H2O", "18", 1),  # digits of names are no numbers
    ("18 dollars in GPT4", "18", 1),
    ("9 * 2 = 18kg", "18", 1),
    ("答案是18元", "18", 1),
    ("The answer is...5", "5", 1),
    ("No.5", "5", 1),
    # how it is written
    ("#### 1,234", "1234", 1),
    ("1234", "#### 1,234", 1),
    ("$1,234,567.00.", "1234567", 1),
    ("1,234", "1", 0),
    ("1,2,3", "3", 1),  # a list, not 123
    ("1,2,3", "123", 0),
    ("10,20", "1020", 0),
    ("1,2345", "12345", 0),
    ("18.0", 18, 1),
    ("18", 18.0, 1),
    ("18.50", "18.5", 1),
    (".5", 0.5, 1),
    ("0.1", 0.1, 1),
    ("0.30000000000000004", 0.3, 0),
    ("$.50", "0.5", 1),
    ("1/2", "0.5", 1),
    ("0.5", "1/2", 1),
    ("36/2", "18", 1),
    ("1/3", "0.3333", 0),
    ("-1/2", "-0.5", 1),
    ("1/0", "1", 0),
    ("1/0", "0", 0),
    ("on 3/4/2024", "2024", 1),  # a date, not 4/2024
    ("5%", "5", 1),
    ("5%", "0.05", 0),
    ("5 %", "5%", 1),
    ("€ 5", "5", 1),
    ("5€", "5", 1),
    ("US$5", "5", 1),
    ("007", "7", 1),
    ("1e3", "1000", 1),
    ("1.5E-1", "0.15", 1),
    ("2e", "2", 1),
    ("版本 1.2.3", "3", 0),
    ("١٨", "18", 1),  # digits of every script
    ("１８", "18", 1),
    ("18²", "18", 1),
    ("9" * 399, "9" * 399, 1),
    ("9" * 399 + "8", "9" * 400, 0),
    ("9" * 5000, "9", 0),  # more digits than Python reads
    # signs
    ("-5", "-5", 1),
    ("−5", "-5", 1),
    ("–5", -5, 1),
    ("-5", "5", 0),
    ("5", "-5", 0),
    ("10-5", "5", 1),  # subtracts
    ("10 - 5", "5", 1),
    ("(10)-5", "5", 1),
    ("= -5", "-5", 1),
    ("3-5", "-5", 0),
    ("-$5", "-5", 1),
    ("$-5", "-5", 1),
    ("$ −1,000.50", "-1000.5", 1),
    ("- 5", "5", 1),  # an item of a list
    ("-0", "0", 1),
    ("+5", "5", 1),
    ("(-5)", "-5", 1),
]

MATCHES = [
    ("Beatles", "Beatles", 1),
    ("  the BEATLES!\n", "Beatles", 1),
    ("The Beatles, in 1963", "Beatles", 0),
    ("", "Beatles", 0),
    ("an apple a day", "Apple, day", 1),
    ("theory", "ory", 0),  # articles are words
    ("“Don’t”", "Don't", 1),
    ("well-known", "wellknown", 1),
    ("well-known", "well known", 0),
    ("Straße", "STRASSE", 1),
    ("Cafe\u0301", "Café", 1),
    ("Ｔｏｋｙｏ", "tokyo", 1),
    ("(A)", "A", 1),  # a choice: the letter is not taken for the article
    ("a.", "A", 1),
    ("", "A", 0),
    ("the", "A", 0),
    ("", "The", 0),
    ("B", "A", 0),
    ("+", "+", 1),
    ("-", "+", 0),
    ("", "+", 0),
    ("... !", "?", 0),
    ("東京。", "東京", 1),
    ("two", ["2", "two"], 1),
    ("three", ["2", "two"], 0),
    ("Two!", ("two",), 1),
]


def short(value):
    return repr(value)[:40]


def test_there_are_enough_cases():
    assert len(NUMBERS) + len(MATCHES) > 40


@pytest.mark.parametrize(("completion", "answer", "score"), NUMBERS, ids=short)
def test_a_number(completion, answer, score):
    assert exact_number([""], [completion], [answer]) == [float(score)]


@pytest.mark.parametrize("text", [text for text, _, _ in NUMBERS if last_number(text) is not None], ids=short)
def test_a_number_equals_itself_and_not_its_successor(text):
    assert exact_number(["", ""], [text, f"{last_number(text) + 1}"], [text, text]) == [1.0, 0.0]


@pytest.mark.parametrize("answer", [None, "", "eighteen", "1/0", True, [18], float("nan"), float("inf"), "9" * 401])
def test_an_answer_without_a_number_is_told(answer):
    with pytest.raises(UserError, match=r"^exact_number: the column 'answer' holds no number: "):
        exact_number(["", ""], ["18", "18"], ["18", answer])


def test_whole_numbers_of_any_size_are_answers():
    assert exact_number([""], ["1" + "0" * 350], [10**350]) == [1.0]
    assert exact_number([""], ["1"], [10**5000]) == [0.0]


@pytest.mark.parametrize(
    "text", ["1," * 50_000, "1" * 100_000, "1,111" * 30_000, "-$" * 50_000, "1/" * 50_000, "####" * 25_000]
)
def test_no_text_takes_long(text):
    begin = time.perf_counter()
    last_number(text)
    assert time.perf_counter() - begin < 2


@pytest.mark.skipif(DATA is None, reason="LOWRANK_RLHF_DATA does not name the folder of the real data")
def test_every_answer_of_gsm8k_is_right_for_its_own_question_and_wrong_for_a_neighbour_of_another_number():
    with gzip.open(Path(DATA) / "gsm8k_test.jsonl.gz", "rt", encoding="utf-8") as file:
        answers = [json.loads(line)["answer"] for line in file]
    # Cobbe et al.'s own rule, which reads nothing but a bare number
    numbers = [Fraction(re.search(r"#### (-?[0-9.,]+)", text)[1].replace(",", "")) for text in answers]
    count = len(answers)
    assert count >= 200
    assert exact_number(answers, answers, answers) == [1.0] * count
    pairs = list(itertools.pairwise(range(count)))
    scores = exact_number(*([answers[i] for i, _ in pairs],) * 2, [answers[j] for _, j in pairs])
    assert scores == [float(numbers[i] == numbers[j]) for i, j in pairs]
    assert sum(scores) < 0.1 * count
    # Without the mark most still end on the same number
    reasoning = [text.partition("####")[0] for text in answers]
    assert sum(exact_number(answers, reasoning, answers)) > 0.8 * count


# Texts


@pytest.mark.parametrize(("completion", "answer", "score"), MATCHES, ids=short)
def test_a_match(completion, answer, score):
    assert exact_match([""], [completion], [answer]) == [float(score)]


def test_aliases_are_right_too_and_may_be_missing():
    aliases = [["NYC", "the Big Apple"], None, [], "Paname"]
    answers = ["New York", "New York", "New York", ["Paris"]]
    assert exact_match([""] * 4, ["Big apple", "NYC", "new york.", "paname"], answers, aliases=aliases) == [1, 0, 1, 1]


@pytest.mark.parametrize("answer", [None, "", " ", 18, 1.5, True, [], ["x", 3], ["x", ""], {"x": 1}])
def test_an_answer_that_is_no_text_is_told(answer):
    with pytest.raises(UserError, match=r"^exact_match: the column 'answer' holds "):
        exact_match(["", ""], ["x", "x"], ["x", answer])


def test_an_alias_that_is_no_text_is_told():
    with pytest.raises(UserError, match=r"^exact_match: the column 'aliases' holds \['x', None\]: expected text"):
        exact_match([""], ["x"], ["x"], aliases=[["x", None]])


@pytest.mark.parametrize("text", ["", " ", "The", "a an the", "!?", "Ⅷ", "a\u00a0b", *(text for text, _, _ in MATCHES)])
def test_normalising_twice_changes_nothing_and_only_nothing_becomes_empty(text):
    assert normalised(normalised(text)) == normalised(text)
    assert bool(normalised(text)) == bool(text.strip())


# Patterns


@pytest.mark.parametrize(
    ("completion", "regex", "score"),
    [
        ("<b>4</b>", r"^<b>\d+</b>$", 1),
        ("It is <b>4</b>", r"^<b>\d+</b>$", 0),
        ("It is <b>4</b>", r"<b>\d+</b>", 1),
        ("Yes", "(?i)YES", 1),
        ("Yes", "YES", 0),
        ("one\ntwo", "^two$", 0),
        ("one\ntwo", "(?m)^two$", 1),
        ("", "^$", 1),
        ("", ".", 0),
    ],
)
def test_a_pattern(completion, regex, score):
    assert pattern([""], [completion], [regex]) == [float(score)]


@pytest.mark.parametrize("bad", ["(", "*", "a{99999999999999999999}", "(?P<x>a)(?P<x>b)", "[z-a]"])
def test_a_bad_pattern_is_named(bad):
    with pytest.raises(UserError, match=rf"^pattern: {re.escape(repr(bad))} is no regular expression: "):
        pattern(["", ""], ["", ""], ["fine", bad])


@pytest.mark.parametrize("bad", [None, "", 5, ["a"]])
def test_a_pattern_that_is_no_text_is_told(bad):
    with pytest.raises(UserError, match=r"^pattern: the column 'pattern' holds "):
        pattern([""], [""], [bad])


# All


@pytest.mark.parametrize("name", ["exact_match", "exact_number", "pattern"])
def test_verifiers_take_any_other_columns_and_return_floats(name):
    columns = {"answer": ["4"], "pattern": ["4"], "level": [3], "question": ["2+2?"]}
    scores = VERIFIERS[name](["2+2?"], ["4"], **columns)
    assert scores == [1.0]
    assert type(scores[0]) is float
    with pytest.raises(ValueError, match="zip"):
        VERIFIERS[name](["", ""], ["4", "4"], **columns)
