"""Rewards that know the answer: 1.0 for a completion that agrees with its row of the data, else 0.0.

Those that need a package of their own are in optional.py. Each is
`fn(prompts, completions, COLUMN, **columns) -> list[float]`; a recipe names it alone, `reward: exact_number`.
"""

import math
import re
import string
import unicodedata
from collections import deque
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from lowrank_rlhf.errors import UserError
from lowrank_rlhf.rewards.optional import math_verify, reasoning_gym

MARK = "####"  # GSM8K's answers stand behind it

# 400 digits at most: longer ones are not worth the time, and Python refuses to read them
NUMBER = re.compile(
    r"""
    (?<![A-Za-z\d]) (?<!\d\.)                     # not inside a word (H2O, x1) or a dotted number (1.2.3)
    (?P<sign> (?<!\)) [-−–‑－] )?                # 7-2 and (7)-2 subtract, −2 is negative
    (?: [$€£¥₹] \ ? (?P<inner_sign> [-−–‑－] )? )?
    (?:
        (?<!/) (?P<top> \d{1,400} ) / (?P<bottom> \d{1,400} ) (?! [\d/] | \.\d )  # a fraction, not a date
      | (?P<decimal>
            (?: (?: \d{1,3} (?:,\d{3})+ | \d{1,400} ) (?!\d) (?: \.\d{1,400} (?!\d) )?
              | (?<![\w).]) \.\d{1,400} (?!\d) )    # .5, but not No.5 and not ...5
            (?: [eE] [-+]? \d{1,3} (?!\w) )?
        )
    )
    """,
    re.VERBOSE,
)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def exact_number(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any], **columns: Any
) -> list[float]:
    """Whether the number that a completion ends on is the number of its row's `answer`; GSM8K's rule.

    Of a text it is the first number on the line of its last `####`, else its last number (`last_number`). Both are
    compared as rationals: 18, 18.0, $18.00 and 36/2 are equal.

    Args:
        answer: a number, or text that holds one in the same way. Shape (B,).

    Raises:
        UserError: an answer holds no number.

    >>> exact_number(["6 × 3?"] * 3, ["6 × 3 = 18.", "#### $18.00", "18 or 19"], ["3 times 6 is 18\\n#### 18"] * 3)
    [1.0, 1.0, 0.0]
    """
    wanted = [_number_of(value) for value in answer]
    return [float(last_number(text) == number) for text, number in zip(completions, wanted, strict=True)]


def last_number(text: str) -> Fraction | None:
    """The number that a text ends on; None where it has none.

    Read are commas between thousands, decimals behind a point, one slash between whole numbers, a minus and a currency
    sign. A percent sign and units are passed over, and so is a sum: of `10 - 4` the last number is 4.

    >>> last_number("so −$1,234.50 in all."), last_number("#### 40%\\nChecked in 2 ways."), last_number("none")
    (Fraction(-2469, 2), Fraction(40, 1), None)
    """
    _, mark, behind = text.rpartition(MARK)
    found = NUMBER.search(behind.partition("\n")[0]) if mark else None
    if found is None:  # also where the mark is a heading's
        found = next(iter(deque(NUMBER.finditer(text), maxlen=1)), None)
    return None if found is None else _value(found)


def _value(found: re.Match[str]) -> Fraction | None:
    if found["decimal"]:
        value = Fraction(Decimal(found["decimal"].replace(",", "")))
    elif int(found["bottom"]) != 0:
        value = Fraction(int(found["top"]), int(found["bottom"]))
    else:
        return None
    return -value if found["sign"] or found["inner_sign"] else value


def _number_of(value: Any) -> Fraction:
    number = None
    if isinstance(value, str):
        number = last_number(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        number = Fraction(value)
    elif isinstance(value, float) and math.isfinite(value):
        number = Fraction(repr(value))  # as it is written: 0.1 is 1/10
    if number is None:
        raise UserError(f"exact_number: the column 'answer' holds no number: {value!r:.80}")
    return number


def exact_match(
    prompts: Sequence[str],
    completions: Sequence[str],
    answer: Sequence[Any],
    aliases: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float]:
    """Whether a completion is its row's `answer`, or one of its `aliases`, once both are normalised (`normalised`).

    Args:
        answer: text, or a list of texts, any of which is right. Shape (B,).
        aliases: further right answers in the same way, or None. Shape (B,).

    Raises:
        UserError: a row has something else there, or no answer.

    >>> exact_match(["Who?"] * 3, ["The Beatles!", "beatles", "The Beatles, in 1963"], ["Beatles"] * 3)
    [1.0, 1.0, 0.0]
    """
    others = [None] * len(answer) if aliases is None else aliases
    rights = [
        _texts_of(value, "answer") | (set() if more is None else _texts_of(more, "aliases"))
        for value, more in zip(answer, others, strict=True)
    ]
    if not all(rights):
        raise UserError("exact_match: the column 'answer' holds an empty list")
    return [float(normalised(text) in right) for text, right in zip(completions, rights, strict=True)]


def normalised(text: str) -> str:
    """Lower case, without punctuation and the articles a, an, the, single spaces; Rajpurkar et al. 2016,
    arXiv:1606.05250, §6.1 and their script, here for the punctuation of all of Unicode.

    Where nothing would be left the articles stay, then the punctuation: else the choice "A" and the operator "+" would
    equal an empty answer. Signs and points of numbers go too, so numbers are for `exact_number`.

    >>> normalised(" An  “Apple”, the\\nbest! "), normalised("(A)"), normalised("+")
    ('apple best', 'a', '+')
    """
    lower = unicodedata.normalize("NFKC", text).casefold()
    plain = "".join(c for c in lower if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    candidates = (" ".join(t.split()) for t in (ARTICLES.sub(" ", plain), plain, lower))
    return next((candidate for candidate in candidates if candidate), "")


def _texts_of(value: Any, column: str) -> set[str]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str) and text.strip() for text in values):
        raise UserError(
            f"exact_match: the column {column!r} holds {value!r:.80}: expected text or a list of texts (numbers are "
            "for exact_number)"
        )
    return {normalised(text) for text in values}


def pattern(prompts: Sequence[str], completions: Sequence[str], pattern: Sequence[Any], **columns: Any) -> list[float]:
    """Whether its row's `pattern`, a regular expression, is found anywhere in a completion (`re.search`).

    The patterns are the data's and trusted: nothing bounds the time of one that backtracks, as `(a+)+$` does.

    Args:
        pattern: Python's syntax, with flags as (?i). Shape (B,).

    Raises:
        UserError: a pattern is none; names it.

    >>> pattern(["", ""], ["<b>4</b>", "4"], [r"^<b>\\d+</b>$", r"^<b>\\d+</b>$"])
    [1.0, 0.0]
    """
    compiled = [_compiled(value) for value in pattern]
    return [float(p.search(text) is not None) for text, p in zip(completions, compiled, strict=True)]


def _compiled(value: Any) -> re.Pattern[str]:
    if not isinstance(value, str) or not value:
        raise UserError(f"pattern: the column 'pattern' holds {value!r:.80}: expected a regular expression")
    try:
        return re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"pattern: {value!r:.80} is no regular expression: {error}") from error


VERIFIERS: dict[str, Callable[..., list[float]]] = {
    verifier.__name__: verifier for verifier in (exact_match, exact_number, pattern, math_verify, reasoning_gym)
}
