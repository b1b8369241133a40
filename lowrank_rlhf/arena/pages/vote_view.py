"""What the voting page shows of a seat, as HTML; no name of a model comes in here before the vote."""

from lowrank_rlhf.arena.chat.engine import Progress
from lowrank_rlhf.arena.pages import sides
from lowrank_rlhf.arena.seat import Revealed, Seat
from lowrank_rlhf.arena.votes.records import STRENGTHS, Vote

LETTERS = "ABCDEFGHI"
DONE = "You have judged everything in this queue. Thank you! You can still ask prompts of your own below."
NO_QUEUE = "This study has no list of prompts: write one below, and compare the answers to it."


def top(name: str | None, progress: tuple[int, int], signed_in: bool) -> str:
    """The line above everything: how far the annotator is, and who that is."""
    done, total = progress
    bar = ""
    if total:
        bar = f'<div class="bar"><i style="width:{100 * done / total:.0f}%"></i></div>'
        bar += f'<span class="count">{done} of {total}</span>'
    who = f'<span class="who">{sides.plain(name)}</span>' if name else ""
    out = ""
    if signed_in:
        out = '<a href="/logout">Sign out</a>'
    elif name:
        out = """<a href="" onclick="localStorage.removeItem('annotator')">Change name</a>"""
    return f'<div class="vote-top"><h1>Which answer is better?</h1>{bar}{who}{out}</div>'


def prompt(seat: Seat) -> str:
    return "" if seat.item is None else sides.prompt(seat.item.prompt, seat.item.system)


def answers(seat: Seat, count: int, written: list[Progress] | None = None) -> list[str]:
    """The answers' frames, one for each of the page's `count` places; "" for a place that nothing is in."""
    if written is not None:
        return [sides.side(*which(p, i)) for i, p in enumerate(written)]
    if seat.state in ("asked", "answering"):
        return [sides.side(letter, "", "waiting") for letter in LETTERS[:count]]
    if seat.comparison is None:
        return [""] * count
    revealed = seat.reveal() if seat.voted else [Revealed("")] * len(seat.comparison.answers)
    best = _best(seat.voted, count)
    return [
        sides.side(LETTERS[i], answer.text, name=who.name, foot=_score(who), chosen=i in best)
        for i, (answer, who) in enumerate(zip(seat.comparison.answers, revealed, strict=True))
    ]


def which(progress: Progress, index: int) -> tuple[str, str, sides.State]:
    """Letter, text and state of an answer that is being written; its speed is left out, it could give a model away."""
    return LETTERS[index], progress.text, "done" if progress.done else "streaming"


def verdict(vote: Vote, names: list[str]) -> str:
    """The vote in words, with who was who."""
    if vote.kind == "ranking":
        ranked = sorted(zip(vote.ranking, LETTERS, names, strict=False))
        return "Saved. Your ranking: " + ", ".join(f"{rank}. {letter} ({name})" for rank, letter, name in ranked) + "."
    if vote.choice in ("a", "b"):
        winner, loser = ("A", "B") if vote.choice == "a" else ("B", "A")
        by = dict(zip("AB", names, strict=True))
        how = f" ({STRENGTHS[vote.strength]})" if vote.strength else ""
        return f"Saved. You chose {winner}, which is {by[winner]}, over {loser}, {by[loser]}{how}."
    said = "a tie" if vote.choice == "tie" else "both bad"
    return f"Saved: {said}. A is {names[0]}, B is {names[1]}."


def _best(vote: Vote | None, count: int) -> set[int]:
    if vote is None:
        return set()
    if vote.kind == "ranking":
        return {i for i, rank in enumerate(vote.ranking) if rank == 1}
    return {"a": {0}, "b": {1}}.get(vote.choice or "", set())


def _score(who: Revealed) -> str:
    return "" if who.score is None else f"reward {who.score:.2f}"
