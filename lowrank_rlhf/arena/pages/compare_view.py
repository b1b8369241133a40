"""What the compare page shows of a conversation, as HTML; see sides.py for why none of it can do anything."""

from lowrank_rlhf.arena.chat.conversation import Conversation
from lowrank_rlhf.arena.chat.engine import Progress
from lowrank_rlhf.arena.pages import sides
from lowrank_rlhf.arena.votes.records import Message

LETTERS = "ABCD"
SHORT_WAIT = 20_000  # characters of a prompt that is shown before anything has read it


def past(conversation: Conversation, column: int, asking: str | None = None) -> str:
    """Who a column is, as far as that may be known, and its turns up to the answer that `live` shows.

    Args:
        asking: the prompt that is being answered; None where nothing is.
    """
    messages: list[Message] = list(conversation.columns[column].messages)
    if asking is not None:
        messages.append({"role": "user", "content": asking})
    elif messages:
        messages.pop()
    name = "" if conversation.hidden else conversation.columns[column].speaker
    heading = f'<span class="letter">{LETTERS[column]}</span><span class="name">{sides.plain(name)}</span>'
    return f'<div class="label">{heading}</div>{sides.turns(messages)}'


def live(conversation: Conversation, column: int, progress: Progress | None = None) -> str:
    """A column's latest answer with its figures below; `progress` is one that is being written."""
    if progress is not None:
        state: sides.State = "done" if progress.done else "streaming"
        return _turn(progress.text, state, figures(progress))
    messages = conversation.columns[column].messages
    if not messages:
        return ""
    foot = ""
    if conversation.latest is not None:
        foot = " · ".join(filter(None, [figures(conversation.latest.answers[column]), _score(conversation, column)]))
    return _turn(messages[-1]["content"], "done", foot)


def waiting() -> str:
    """A column of which nothing has come yet."""
    return _turn("", "waiting", "waiting for the model …")


def figures(progress: Progress) -> str:
    """Length and speed of an answer, and why it ended where it did."""
    parts = [f"{progress.tokens} token{'' if progress.tokens == 1 else 's'}"]
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:.1f} tokens/s")
    if progress.tokens:
        parts.append(f"first after {progress.first_token_milliseconds / 1000:.1f} s")
    if progress.done and progress.stopped:
        parts.append("stopped")
    elif progress.done and not progress.ended:
        parts.append("cut at max tokens")
    return " · ".join(parts)


def revealed(conversation: Conversation) -> str:
    """Who was who, for the note under a vote."""
    scored = [f"{LETTERS[at]} is {column.speaker}" for at, column in enumerate(conversation.columns)]
    return ", ".join(scored)


def _score(conversation: Conversation, column: int) -> str:
    if not conversation.scores:
        return ""
    return "scored: shown after the vote" if conversation.hidden else f"reward {conversation.scores[column]:.2f}"


def _turn(text: str, state: sides.State, foot: str) -> str:
    answer = sides.answer(text, state)
    return f'<div class="turn assistant">{answer}<div class="foot">{sides.plain(foot)}</div></div>'
