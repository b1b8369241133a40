"""What the compare page shows of a conversation, as HTML; see sides.py for why none of it can do anything."""

from lowrank_rlhf.arena.chat.conversation import Conversation
from lowrank_rlhf.arena.chat.engine import Progress
from lowrank_rlhf.arena.pages import sides
from lowrank_rlhf.arena.votes.records import Message

LETTERS = "ABCD"
LONGEST_PREVIEW = 2_000  # characters of a prompt that is shown before the engine has taken it


def letter(column: int, name: str = "") -> str:
    """The heading of a column."""
    spans = f'<span class="letter">{LETTERS[column]}</span><span class="name">{sides.plain(name)}</span>'
    return f'<div class="label">{spans}</div>'


def head(conversation: Conversation, column: int) -> str:
    """The letter of a column, and who it is as far as that may be known."""
    return letter(column, "" if conversation.hidden else conversation.names[column])


def past(conversation: Conversation, column: int, asking: str | None = None) -> str:
    """A column's turns up to the answer that `live` shows; `asking` is the prompt that is being answered."""
    messages: list[Message] = list(conversation.columns[column].messages)
    if asking is None:
        return sides.turns(messages[:-1])
    short = asking if len(asking) <= LONGEST_PREVIEW else asking[:LONGEST_PREVIEW] + " …"
    return sides.turns([*messages, {"role": "user", "content": short}])


def live(conversation: Conversation, column: int, progress: Progress | None = None) -> str:
    """A column's latest answer with its figures below; `progress` is one that is being written."""
    if progress is not None:
        state: sides.State = "done" if progress.done else "streaming"
        return _turn(progress.text, state, figures(progress))
    messages = conversation.columns[column].messages
    if not messages:
        return nothing(column)
    foot = ""
    if conversation.latest is not None:
        foot = " · ".join(filter(None, [figures(conversation.latest.answers[column]), _score(conversation, column)]))
    return _turn(messages[-1]["content"], "done", foot)


def nothing(column: int) -> str:
    """A column before its first turn; the first one says what to do."""
    return sides.empty("Write a prompt below: all columns answer it at once.") if column == 0 else ""


def waiting(loaded: bool) -> str:
    """A column of which nothing has come yet; the first answer of all also waits for the base to be read."""
    return _turn("", "waiting", "waiting for the model …" if loaded else "loading the base model …")


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
    return ", ".join(f"{LETTERS[at]} is {name}" for at, name in enumerate(conversation.names))


def _score(conversation: Conversation, column: int) -> str:
    if not conversation.scores:
        return ""
    return "scored: shown after the vote" if conversation.hidden else f"reward {conversation.scores[column]:.2f}"


def _turn(text: str, state: sides.State, foot: str) -> str:
    answer = sides.answer(text, state)
    return f'<div class="turn assistant">{answer}<div class="foot">{sides.plain(foot)}</div></div>'
