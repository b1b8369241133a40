"""What a comparison and a vote must be before they are stored."""

import math
import re
from collections.abc import Sequence
from typing import Any, get_args

from lowrank_rlhf.arena.votes.reading import key, same_vote
from lowrank_rlhf.arena.votes.records import REASONS, STRENGTHS, Choice, Comparison, Kind, Vote
from lowrank_rlhf.errors import UserError

MAX_TEXT_BYTES = 1_000_000
MAX_COMMENT_CHARACTERS = 10_000
MAX_NAME_CHARACTERS = 100
MAX_ANSWERS = 9

DECIDING = ("pair", "ranking")  # the kinds of votes that judge a comparison as a whole
ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
FIELDS = {
    "pair": {"choice", "strength"},
    "ranking": {"ranking"},
    "thumb": {"up", "answer"},
    "better": {"text", "answer"},
}


def check_name(name: str) -> None:
    """
    Raises:
        UserError: no name of an annotator.
    """
    if not isinstance(name, str) or not name.strip():
        raise UserError("annotator: the name is empty; every vote is somebody's, give a name")
    if len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
        raise UserError(f"annotator: expected a name of at most {MAX_NAME_CHARACTERS} printable characters")


def check_comparison(comparison: Comparison) -> None:
    """
    Raises:
        UserError: it has too few or too many answers, answers to nothing, or a text that is too long.
    """
    check_name(comparison.annotator)
    _check_id("comparison", comparison.id)
    answers = comparison.answers
    if not 1 <= len(answers) <= MAX_ANSWERS:
        raise UserError(f"comparison {comparison.id}: expected 1 to {MAX_ANSWERS} answers, got {len(answers)}")
    if len({answer.id for answer in answers}) < len(answers):
        raise UserError(f"comparison {comparison.id}: two of its answers have the same id")
    for answer in answers:
        _check_id("answer", answer.id)
        if not answer.prompt or answer.prompt[-1].get("role") != "user":
            raise UserError(f"answer {answer.id}: its prompt does not end with a user's message")
        check_size(answer.text, f"answer {answer.id}")
        if answer.score is not None:
            check_score(answer.score, f"answer {answer.id}")
        check_size(answer.decoding.system, f"answer {answer.id}: its system prompt")
        check_size("".join(turn.get("content", "") for turn in answer.prompt), f"answer {answer.id}: its prompt")


def check_size(text: str, what: str) -> None:
    """
    Raises:
        UserError: more than a million bytes of UTF-8, or no Unicode text.
    """
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise UserError(f"{what}: character {error.start + 1} is half of a surrogate pair: expected Unicode") from error
    if size > MAX_TEXT_BYTES:
        raise UserError(f"{what}: {size} bytes are more than is stored of a text ({MAX_TEXT_BYTES}); shorten it")


def check_score(score: float, what: str) -> None:
    """
    Raises:
        UserError: it is not a finite number.
    """
    if not math.isfinite(score):
        raise UserError(f"{what}: its score is {score}; expected a finite number, so look at the reward model")


def check_vote(vote: Vote, comparison: Comparison) -> None:
    """
    Raises:
        UserError: it is another's comparison, or the vote does not fit it; says which field and what is expected.
    """
    _check_id("vote", vote.id)
    if vote.annotator != comparison.annotator:
        raise UserError(f"vote {vote.id}: this comparison was shown to another annotator; ask for one of your own")
    if vote.kind not in get_args(Kind):
        raise UserError(f"vote {vote.id}: kind: expected {', '.join(get_args(Kind))}, got {vote.kind!r:.40}")
    _check_fields(vote)
    if vote.kind == "pair":
        _check_pair(vote, comparison)
    elif vote.kind == "ranking":
        _check_ranking(vote, comparison)
    else:
        _check_single(vote, comparison)
    unknown = [reason for reason in vote.reasons if reason not in REASONS]
    if unknown or len(set(vote.reasons)) < len(vote.reasons):
        raise UserError(f"vote {vote.id}: reasons: expected some of {', '.join(REASONS)}, got {vote.reasons!r:.200}")
    if not isinstance(vote.comment, str):
        raise UserError(f"vote {vote.id}: comment: expected text, got {type(vote.comment).__name__}")
    if len(vote.comment) > MAX_COMMENT_CHARACTERS:
        size = f"{len(vote.comment)} characters are more than {MAX_COMMENT_CHARACTERS}"
        raise UserError(f"vote {vote.id}: comment: {size}; shorten it")
    check_size(vote.comment, f"vote {vote.id}: comment")
    if not is_count(vote.milliseconds):
        raise UserError(f"vote {vote.id}: milliseconds: expected a whole number from 0, got {vote.milliseconds!r:.40}")


def check_place(vote: Vote, comparison: Comparison, before: Sequence[Vote]) -> None:
    """
    Args:
        before: the votes on the comparison so far, in order.

    Raises:
        UserError: the comparison is judged as a whole already, in the other way, or its names were shown by a vote
            that was taken back.
    """
    if vote.kind not in DECIDING:
        return
    whole = {key(earlier): earlier for earlier in before if earlier.kind in DECIDING}
    if comparison.blind and any(earlier.withdrawn for earlier in before if earlier.kind in DECIDING):
        raise UserError(
            f"vote {vote.id}: the names were shown before this comparison's vote was taken back; "
            "vote on its copy that is not blind"
        )
    other = [last.kind for last in whole.values() if last.kind != vote.kind and not last.withdrawn]
    if other:
        raise UserError(f"vote {vote.id}: a {other[0]} of these answers stands already; take that one back first")


def sent_again(vote: Vote, earlier: Vote, votes: Sequence[Vote]) -> Vote:
    """The vote that is stored, where it is sent again and still stands.

    Args:
        votes: those on the comparison, in order.

    Raises:
        UserError: it stands no more, or is another vote under the same id.
    """
    stored = same_vote(vote, earlier)
    if [later for later in votes if key(later) == key(stored)][-1].id != stored.id:
        raise UserError(f"vote {vote.id}: it was taken back, or a later one has taken its place; it stands no more")
    return stored


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_id(what: str, value: Any) -> None:
    if not isinstance(value, str) or not ID.fullmatch(value):
        raise UserError(f"{what}: expected an id of 1 to 64 letters, digits, - and _, got {value!r:.80}")


def _check_fields(vote: Vote) -> None:
    values: dict[str, Any] = {
        "choice": vote.choice,
        "strength": vote.strength,
        "ranking": vote.ranking or None,
        "up": vote.up,
        "answer": vote.answer,
        "text": vote.text,
    }
    foreign = [name for name, value in values.items() if value is not None and name not in FIELDS[vote.kind]]
    if foreign:
        raise UserError(f"vote {vote.id}: a vote of kind {vote.kind} has no {foreign[0]}; leave it out")


def _check_pair(vote: Vote, comparison: Comparison) -> None:
    if len(comparison.answers) != 2:
        raise UserError(f"vote {vote.id}: a choice needs 2 answers, this comparison has {len(comparison.answers)}")
    if vote.choice not in get_args(Choice):
        raise UserError(f"vote {vote.id}: choice: expected {', '.join(get_args(Choice))}, got {vote.choice!r:.40}")
    if vote.strength is None:
        return
    if vote.choice not in ("a", "b"):
        raise UserError(f"vote {vote.id}: strength: only a vote for a or b has one; leave it out")
    if not is_count(vote.strength) or vote.strength not in STRENGTHS:
        raise UserError(
            f"vote {vote.id}: strength: expected {min(STRENGTHS)} to {max(STRENGTHS)}, got {vote.strength!r:.40}"
        )


def _check_ranking(vote: Vote, comparison: Comparison) -> None:
    count, ranks = len(comparison.answers), vote.ranking
    if count < 2:
        raise UserError(f"vote {vote.id}: a ranking needs 2 answers or more, this comparison has 1")
    if len(ranks) != count or not all(is_count(rank) and 1 <= rank <= count for rank in ranks) or 1 not in ranks:
        raise UserError(
            f"vote {vote.id}: ranking: expected a rank of 1 (the best) to {count} for each of the {count} answers, "
            f"equal for ties, got {list(ranks)!r:.80}"
        )


def _check_single(vote: Vote, comparison: Comparison) -> None:
    about = next((answer for answer in comparison.answers if answer.id == vote.answer), None)
    if about is None:
        raise UserError(f"vote {vote.id}: answer: this comparison has no answer {vote.answer!r:.80}")
    if vote.kind == "thumb":
        if not isinstance(vote.up, bool):
            raise UserError(f"vote {vote.id}: up: expected true or false, got {vote.up!r:.40}")
        return
    if not isinstance(vote.text, str) or not vote.text.strip():
        raise UserError(f"vote {vote.id}: the better answer is empty; write one")
    check_size(vote.text, f"vote {vote.id}: the better answer")
    if vote.text.strip() == about.text.strip():
        raise UserError(f"vote {vote.id}: the better answer is the same as the shown one; change it first")
