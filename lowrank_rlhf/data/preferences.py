"""Rows that say which of two or more answers is better as examples: one function per format."""

import itertools
import re
from dataclasses import replace

from lowrank_rlhf.data.demonstrations import best_path, oasst_turn, system_turn
from lowrank_rlhf.data.examples import Example, Messages
from lowrank_rlhf.data.fields import (
    Row,
    answer,
    check_answer,
    check_prompt,
    messages,
    number,
    others,
    prompt,
    sequence,
    short,
    text,
    thumb,
)
from lowrank_rlhf.errors import UserError


def from_preference(row: Row, where: str) -> Example:
    return _pair(row, where, "chosen", "rejected")


def from_winner_loser(row: Row, where: str) -> Example:
    return _pair(row, where, "winner", "loser")


def from_sharegpt_preference(row: Row, where: str) -> Example:
    turns = system_turn(row, where) + messages(row, "conversations", where)
    check_prompt(turns, f"{where}: column 'conversations'")
    return _pair(row, where, "chosen", "rejected", turns, ("conversations", "system"))


def from_labelled_pair(row: Row, where: str) -> Example:
    """`preferred_response` names the better of `response_a` and `response_b`, or repeats its text."""
    said = {"a": text(row, "response_a", where, empty=True), "b": text(row, "response_b", where, empty=True)}
    label = text(row, "preferred_response", where)
    sides = [s for s in "ab" if label.strip().lower() in (s, f"response_{s}") or label == said[s]]
    if len(sides) != 1:
        raise UserError(
            f"{where}: column 'preferred_response': expected a, b, response_a, response_b or the text of one of the "
            f"two, got {short(label)}"
        )
    better, worse = ("response_a", "response_b") if sides == ["a"] else ("response_b", "response_a")
    example = _pair(row, where, better, worse)
    example.columns.pop("preferred_response")
    return example


def _pair(
    row: Row, where: str, better: str, worse: str, turns: Messages | None = None, used: tuple[str, ...] = ("prompt",)
) -> Example:
    turns = prompt(row, "prompt", where) if turns is None else turns
    chosen = answer(row, better, where, turns, empty=True)
    rejected = answer(row, worse, where, turns, empty=True)
    return Example(
        where, turns, chosen, rejected, others(row, *used, better, worse, "margin"), margin=_margin(row, where)
    )


def _margin(row: Row, where: str) -> float | None:
    margin = number(row, "margin", where)
    if margin is not None and margin < 0:
        raise UserError(f"{where}: column 'margin': expected how much better the chosen answer is, got {margin:g}")
    return margin


def from_hh(row: Row, where: str) -> Example:
    """HH-RLHF: two dialogues, as text or as messages; their common start is the prompt."""
    chosen, rejected = _dialogue(row, "chosen", where), _dialogue(row, "rejected", where)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    # The prompt ends with the human's turn; where the two answers are equal, the last answer is what is compared.
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    while shared > 0 and chosen[shared - 1]["role"] != "user":
        shared -= 1
    if shared == 0:
        raise UserError(f"{where}: the chosen and rejected dialogues do not begin with the same human turn")
    columns = others(row, "chosen", "rejected", "margin")
    better, worse = chosen[shared:], rejected[shared:]
    for column, turns in (("chosen", better), ("rejected", worse)):
        check_answer(turns, f"{where}: column {column!r}")
    return Example(where, chosen[:shared], better, worse, columns, margin=_margin(row, where))


def _dialogue(row: Row, column: str, where: str) -> Messages:
    """'\\n\\nHuman: … \\n\\nAssistant: …' into messages."""
    if isinstance(row.get(column), list):
        return messages(row, column, where)
    lead, *parts = re.split(r"\n\n(Human|Assistant):", text(row, column, where))
    if lead.strip() or not parts:
        raise UserError(
            f"{where}: column {column!r}: expected an HH-RLHF dialogue ('\\n\\nHuman: …\\n\\nAssistant: …'); "
            "plain answers need a 'prompt' column beside them"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def from_unpaired(row: Row, where: str) -> Example:
    """One answer and whether it was liked: `chosen` where `label` is true, `rejected` where it is false."""
    turns = prompt(row, "prompt", where)
    said = answer(row, "completion", where, turns, empty=True)
    liked = thumb(row, "label", where)
    columns = others(row, "prompt", "completion", "label")
    return Example(where, turns, said if liked else None, None if liked else said, columns)


def best_of_ranked(row: Row, where: str) -> Example:
    """The best-ranked response of a ranked row, as a demonstration."""
    best = ranked_pairs(row, where)[0]
    return replace(best, rejected=None, weight=1.0)


def ranked_pairs(row: Row, where: str) -> list[Example]:
    """All pairs of a row with `responses` and `ranking`; `ranking[i]` is the rank of `responses[i]`.

    1 is the best (or 0, if the ranks begin there); equal ranks are ties and make no pair. Every pair carries the
    weight 1 / number of pairs, so that a prompt counts once however many responses it has.
    """
    turns = prompt(row, "prompt", where)
    responses = sequence(row, "responses", where)
    ranking = sequence(row, "ranking", where)
    if len(responses) < 2:
        raise UserError(f"{where}: column 'responses': expected 2 or more to compare, got 1")
    if len(ranking) != len(responses):
        raise UserError(f"{where}: column 'ranking': expected {len(responses)} ranks, got {len(ranking)}")
    ranks = _ranks(ranking, f"{where}: column 'ranking'")
    answers = []
    for i, response in enumerate(responses, start=1):
        answers.append(answer({f"responses[{i}]": response}, f"responses[{i}]", where, turns, empty=True))
    return _pairs(where, turns, answers, ranks, others(row, "prompt", "responses", "ranking"))


def _ranks(ranking: list[object], what: str) -> list[int]:
    ranks = [r for r in ranking if isinstance(r, int) and not isinstance(r, bool)]
    if len(ranks) != len(ranking):
        raise UserError(f"{what}: expected whole numbers, got {short(ranking)}")
    distinct = sorted(set(ranks))
    if distinct[0] not in (0, 1) or distinct != list(range(distinct[0], distinct[0] + len(distinct))):
        raise UserError(
            f"{what}: expected ranks from 1 (the best) without gaps, ties share a rank; got {short(ranking)}"
        )
    if len(distinct) == 1:
        raise UserError(f"{what}: all ranks are equal, so there is nothing to learn from: {short(ranking)}")
    return ranks


def _pairs(where: str, turns: Messages, answers: list[Messages], ranks: list[int], columns: Row) -> list[Example]:
    order = sorted(range(len(answers)), key=ranks.__getitem__)
    pairs = [(i, j) for i, j in itertools.combinations(order, 2) if ranks[i] < ranks[j]]
    for i, j in pairs:
        if answers[i] == answers[j]:
            raise UserError(f"{where}: responses {i + 1} and {j + 1} are the same text with different ranks")
    return [Example(where, turns, answers[i], answers[j], columns, weight=1 / len(pairs)) for i, j in pairs]


def oasst_pairs(row: Row, where: str) -> list[Example]:
    """The ranked replies along an OASST tree's best path, each place with two or more ranks as a K-wise comparison."""
    pairs: list[Example] = []
    path = best_path(row, where)
    turns: Messages = []
    for turn, replies in path:
        turns = [*turns, turn]
        ranked = [reply for reply in replies if reply.get("rank") is not None]
        if turn["role"] == "user" and len({reply["rank"] for reply in ranked}) > 1:
            answers = [[oasst_turn(reply, "assistant", where)] for reply in ranked]
            pairs += _pairs(where, turns, answers, [reply["rank"] for reply in ranked], others(row, "prompt"))
    if not pairs:
        raise UserError(f"{where}: column 'prompt': no place of the tree has two ranked replies to compare")
    return pairs
