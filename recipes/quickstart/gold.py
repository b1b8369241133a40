"""The gold rule: a plain function that stands in for the human who labels data and judges at the end.

It scores the labels of recipes/quickstart/data and the finished policies. It is never a training signal: what trains
is a reward model that saw 10 % wrong labels, so over-optimisation shows as a reward that rises while gold falls.

    0.4  says what it must: the share of the prompt's `must_mention` items that the answer mentions
    0.2  15 to 60 words
    0.2  ends complete: its last character ends a sentence (quotes and brackets may follow)
    0.1  no repetition: no three words in a row and no sentence come twice
    0.1  no boilerplate opening ("Sure", "Certainly", "As an AI", "Great question", "Here are", …)

An item is alternatives separated by "|"; one is mentioned where it stands at the start of a word, in any case, and no
digit follows ("bubbl" is in "Bubbles", "16" is not in "1600"). Curly apostrophes count as straight. A word is a run
of letters and digits, with inner ' . , - ; an answer without a word scores 0.
"""

import re

WEIGHTS = {"mentions": 0.4, "length": 0.2, "complete": 0.2, "no_repetition": 0.1, "no_boilerplate": 0.1}
MIN_WORDS, MAX_WORDS = 15, 60

WORD = re.compile(r"[^\W_]+(?:['.,-][^\W_]+)*")
SENTENCE_END = re.compile(r"[.!?][\"')\]*”’]*$")
# A list marker that the next item never followed: "1. Boil water.\n2."
DANGLING_MARKER = re.compile(r"(?:^|\s)\d+\.$")
BOILERPLATE = re.compile(
    r"\W*(?:sure|certainly|absolutely|of course|as an ai|as a language model|as an assistant"
    r"|(?:i'm|i am|i'd be|i would be) (?:very |so |more than )?(?:happy|glad|pleased|excited|delighted|here) to"
    r"|i can help|(?:what a |that's a |that is a |this is a )?(?:great|good|excellent|interesting) question"
    # Not every "Thank you for": some prompts ask for a thank-you note
    r"|thank(?:s| you) for (?:asking|reaching|contacting|sharing|your (?:question|message|inquiry|interest|request))"
    r"|here is|here's|here are)\b",
    re.IGNORECASE,
)


def gold(
    prompts: list[str], completions: list[str], *, must_mention: list[list[str]], **columns: list[object]
) -> list[float]:
    """Score of each completion, in [0, 1].

    Args:
        must_mention: the items of each prompt.

    >>> gold([""], ["Yeast makes gas, and the bubbles of that gas need an hour to lift the dough."],
    ...      must_mention=[["yeast", "gas|bubbl"]])
    [1.0]
    """
    return [score(completion, items) for completion, items in zip(completions, must_mention, strict=True)]


def score(completion: str, items: list[str]) -> float:
    """The weighted sum of `checks`, rounded so that equal answers compare equal."""
    values = checks(completion, items)
    return round(sum(WEIGHTS[name] * value for name, value in values.items()), 4)


def checks(completion: str, items: list[str]) -> dict[str, float]:
    """Each part of the rule on its own, in [0, 1]; all 0 where there is no word.

    >>> checks("Sure! Use yeast", ["yeast", "gas"])["mentions"]
    0.5
    """
    text = straight(completion).strip()
    words = WORD.findall(text.lower())
    if not words:
        return dict.fromkeys(WEIGHTS, 0.0)
    return {
        "mentions": sum(mentions(text, item) for item in items) / len(items),
        "length": float(MIN_WORDS <= len(words) <= MAX_WORDS),
        "complete": float(bool(SENTENCE_END.search(text)) and not DANGLING_MARKER.search(text)),
        "no_repetition": float(not repeats(text, words)),
        "no_boilerplate": float(not BOILERPLATE.match(text)),
    }


def mentions(text: str, item: str) -> bool:
    """Whether one of the item's alternatives starts a word of the text."""
    alternatives = "|".join(re.escape(straight(alternative)) for alternative in item.split("|"))
    return bool(re.search(rf"(?<!\w)(?:{alternatives})(?!\d)", straight(text), re.IGNORECASE))


def repeats(text: str, words: list[str]) -> bool:
    """Whether three words in a row, or a whole sentence or line, come twice."""
    triples = list(zip(words, words[1:], words[2:], strict=False))
    sentences = [tuple(WORD.findall(part)) for part in re.split(r"(?<=[.!?])\s|\n", text.lower())]
    sentences = [sentence for sentence in sentences if sentence]
    return len(set(triples)) < len(triples) or len(set(sentences)) < len(sentences)


def straight(text: str) -> str:
    return text.replace("’", "'").replace("‘", "'")
