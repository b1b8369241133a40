"""The gold rule by hand: 0.4 mentions + 0.2 for 15–60 words + 0.2 complete + 0.1 no repetition + 0.1 no boilerplate."""

import pytest

from recipes.quickstart.gold import BOILERPLATE, WEIGHTS, checks, gold, mentions

BREAD = ["yeast", "gas|carbon dioxide|bubbl|air"]
ANSWERS = {
    # everything: both items, 20 words, ends: 0.4 + 0.2 + 0.2 + 0.1 + 0.1
    "perfect": (
        1.0,
        "Yeast eats the sugar in the dough and gives off gas, and those pockets need an hour to lift it.",
    ),
    # "Bubbles" starts with "bubbl", in any case; "yeasty" starts with "yeast"; 15 words, the fewest that count
    "word starts count, whatever the case": (
        1.0,
        "Bubbles form inside, the loaf turns light, and it all gets a pleasant, yeasty smell.",
    ),
    # "pair" does not start with "air", "by-gas" starts a word with "gas" after the hyphen: both items, 17 words
    "a hyphen starts a word": (
        1.0,
        "Given warmth, yeast makes a by-gas, and a pair of hours lets it lift your whole loaf.",
    ),
    # "air" only inside "fair" and "stairs": 1 of 2 items, 18 words: 0.2 + 0.2 + 0.2 + 0.1 + 0.1
    "inside a word is no mention": (
        0.8,
        "In a fair while, standing below the stairs where it is warm, yeast lifts the dough up nicely.",
    ),
    # no item, otherwise fine, 18 words: 0 + 0.2 + 0.2 + 0.1 + 0.1
    "no item": (
        0.6,
        "Waiting makes the loaf softer and lighter, and most bakers would say that it tastes much better too.",
    ),
    # 5 words: 0.4 + 0 + 0.2 + 0.1 + 0.1
    "too short": (0.8, "Yeast needs to make gas."),
    # 14 words, one too few: 0.4 + 0 + 0.2 + 0.1 + 0.1
    "one word too short": (0.8, "Yeast eats sugar and gives off gas, which needs an hour to lift it."),
    # 61 different numbers and words, one too many: 0.4 + 0 + 0.2 + 0.1 + 0.1
    "one word too long": (0.8, "Yeast gas " + " ".join(f"n{i}" for i in range(59)) + "."),
    # 60 words: 1
    "as long as can be": (1.0, "Yeast gas " + " ".join(f"n{i}" for i in range(58)) + "."),
    # the perfect answer, cut before its end, 18 words: 0.4 + 0.2 + 0 + 0.1 + 0.1
    "cut": (
        0.8,
        "Yeast eats the sugar in the dough and gives off gas, and those pockets need an hour to",
    ),
    # the last full stop belongs to a list marker whose item never came, 17 words: 0.4 + 0.2 + 0 + 0.1 + 0.1
    "cut after a list marker": (
        0.8,
        "1. Yeast eats sugar and makes gas.\n2. The gas lifts the dough while it rests.\n3.",
    ),
    # a quotation mark and a bracket may follow the last stop, 17 words: 1
    "ends in a quotation": (
        1.0,
        'My grandmother (a baker) always said: "Yeast makes gas, and gas needs time to lift a loaf!")',
    ),
    # "the dough rises" twice, 17 words: 0.4 + 0.2 + 0.2 + 0 + 0.1
    "three words in a row twice": (
        0.9,
        "When yeast makes gas the dough rises, and when the dough rises the loaf gets light inside.",
    ),
    # the sentence "Wait." twice, 16 words: 0.4 + 0.2 + 0.2 + 0 + 0.1
    "a sentence twice": (
        0.9,
        "Wait. Yeast turns sugar into gas, and only slow pockets make your loaf really light. Wait.",
    ),
    # "Sure" opens, 19 words: 0.4 + 0.2 + 0.2 + 0.1 + 0
    "boilerplate": (
        0.9,
        "Sure! Yeast eats the sugar in the dough and gives off gas, which needs an hour to lift it.",
    ),
    # with a curly apostrophe and a capital, 23 words: 0.4 + 0.2 + 0.2 + 0.1 + 0
    "boilerplate with a curly apostrophe": (
        0.9,
        "I’m happy to help. Yeast eats sugar in your dough and gives off gas, which needs an hour to lift it all.",
    ),
    # "Surely" is not "Sure", 15 words: 1
    "not boilerplate": (
        1.0,
        "Surely because yeast works slowly: it makes gas, which must lift all of that flour.",
    ),
    # nothing, and white space: 0, not 0.2 for having neither repetition nor boilerplate
    "empty": (0.0, " \n"),
    # dots are no words: 0
    "no word": (0.0, "..."),
    # cut, too long (100 words), repeated, with boilerplate, no item: 0
    "everything wrong": (0.0, "Certainly! " + "It is very good to wait " * 16 + "it is so"),
}


def test_there_are_20_answers():
    assert len(ANSWERS) == 20


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_scored_by_hand(name):
    expected, answer = ANSWERS[name]
    assert gold(["Why must dough rise?"], [answer], must_mention=[BREAD]) == [expected]


def test_a_batch_is_scored_row_by_row_and_other_columns_do_not_matter():
    scores = [expected for expected, _ in ANSWERS.values()]
    answers = [answer for _, answer in ANSWERS.values()]
    count = len(answers)
    assert gold([""] * count, answers, must_mention=[BREAD] * count, answer=["42"] * count) == scores
    with pytest.raises(ValueError, match="shorter"):
        gold(["", ""], ["a", "b"], must_mention=[BREAD])


def test_the_weights_add_up_to_one():
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    assert list(checks("Yes.", ["yes"])) == list(WEIGHTS)


@pytest.mark.parametrize(
    ("item", "text", "expected"),
    [
        ("16|sixteen", "They have 16 legs.", True),
        ("16|sixteen", "Sixteen!", True),
        ("16|sixteen", "They have 1600 legs.", False),
        ("16|sixteen", "They have 116 legs.", False),
        ("don't", "I don’t know", True),
        ("r.i.p", "rxixp", False),  # a dot is a dot
        ("wi-fi|wifi", "No Wi-Fi here", True),
    ],
)
def test_mentions(item, text, expected):
    assert mentions(text, item) is expected


@pytest.mark.parametrize(
    "opening",
    [
        "Sure, ",
        '"Certainly! ',
        "Of course. ",
        "As an AI language model, ",
        "I'd be glad to ",
        "I am so excited to ",
        "What a great question! ",
        "That's an ",
        "Great question! ",
        "Thank you for your question. ",
        "Thanks for asking! ",
        "Here are two tips: ",
        "Here's a note: ",
    ],
)
def test_boilerplate_openings(opening):
    assert bool(BOILERPLATE.match(opening)) is (opening != "That's an ")


@pytest.mark.parametrize("opening", ["Thank you for the scarf.", "Hereby", "Great whales", "I am here.", "Surely"])
def test_openings_that_say_something(opening):
    assert not BOILERPLATE.match(opening)
