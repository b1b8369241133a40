"""Rows that show one answer (or none, for prompts) as examples: one function per format."""

from typing import Any

from lowrank_rlhf.data.examples import Example, Messages
from lowrank_rlhf.data.fields import Row, answer, check_text, messages, others, prompt, split_dialogue, text
from lowrank_rlhf.errors import UserError


def from_messages(row: Row, where: str) -> Example:
    turns, last = split_dialogue(messages(row, "messages", where), f"{where}: column 'messages'")
    return Example(where, turns, last, columns=others(row, "messages"))


def from_sharegpt(row: Row, where: str) -> Example:
    """`conversations` of {from, value}, and an optional `system` column."""
    turns = system_turn(row, where) + messages(row, "conversations", where)
    before, last = split_dialogue(turns, f"{where}: column 'conversations'")
    return Example(where, before, last, columns=others(row, "conversations", "system"))


def system_turn(row: Row, where: str) -> Messages:
    said = text(row, "system", where, empty=True) if row.get("system") is not None else ""
    return [{"role": "system", "content": said}] if said.strip() else []


def from_flan(row: Row, where: str) -> Example:
    return _single(row, "inputs", "targets", where)


def from_completion(row: Row, where: str) -> Example:
    return _single(row, "prompt", "completion", where)


def from_prompt(row: Row, where: str) -> Example:
    return Example(where, prompt(row, "prompt", where), columns=others(row, "prompt"))


def from_alpaca(row: Row, where: str) -> Example:
    return _instruction(row, "output", where)


def from_instruction(row: Row, where: str) -> Example:
    return _instruction(row, "response", where)


def _single(row: Row, asked: str, said: str, where: str) -> Example:
    turns = prompt(row, asked, where)
    return Example(where, turns, answer(row, said, where, turns), columns=others(row, asked, said))


def _instruction(row: Row, said: str, where: str) -> Example:
    """An instruction and, below it, what it is about: Alpaca calls that `input`, Dolly `context`."""
    about = [text(row, c, where, empty=True) for c in ("input", "context") if row.get(c) is not None]
    parts = [text(row, "instruction", where), *about]
    turns = [{"role": "user", "content": "\n\n".join(part for part in parts if part.strip())}]
    reply = answer(row, said, where, turns)
    return Example(where, turns, reply, columns=others(row, "instruction", "input", "context", said))


def from_oasst(row: Row, where: str) -> Example:
    """The best-ranked path of an OASST tree, its last answer as the demonstration."""
    turns = [turn for turn, _ in best_path(row, where)]
    if turns[-1]["role"] == "user" and len(turns) > 1:  # the path goes on with a question nobody answered
        turns = turns[:-1]
    before, last = split_dialogue(turns, f"{where}: column 'prompt'")
    return Example(where, before, last, columns=others(row, "prompt"))


def best_path(row: Row, where: str) -> list[tuple[dict[str, str], list[Any]]]:
    """The turns of a tree from its root along the best-ranked replies, and each turn's replies, best first.

    Rank 0 is the best; a reply without a rank comes after those that have one, in the file's order.
    """
    node, role = row.get("prompt"), "user"
    path: list[tuple[dict[str, str], list[Any]]] = []
    while node is not None:
        what = f"{where}: column 'prompt', turn {len(path) + 1}"
        turn, replies = oasst_turn(node, role, what), node.get("replies") or []
        if not isinstance(replies, list):
            raise UserError(f"{what}: expected 'replies' to be a list, got {type(replies).__name__}")
        role = "assistant" if role == "user" else "user"
        for reply in replies:
            oasst_turn(reply, role, f"{what}, one of its replies")
        replies = sorted((r for r in replies if not r.get("deleted")), key=lambda r: (r.get("rank") is None, rank(r)))
        path.append((turn, replies))
        node = replies[0] if replies else None
    return path


def rank(reply: dict[str, Any]) -> int:
    return reply.get("rank") or 0


def oasst_turn(node: Any, role: str, what: str) -> dict[str, str]:
    names = {"user": ("prompter", "user", "human"), "assistant": ("assistant",)}[role]
    if not isinstance(node, dict) or node.get("role") not in names:
        got = f"role {node.get('role')!r:.40}" if isinstance(node, dict) else type(node).__name__
        raise UserError(f"{what}: expected {{'role': {names[0]!r}, 'text': …, 'replies': […]}}, got {got}")
    value = node.get("rank")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise UserError(f"{what}: expected 'rank' to be a whole number or null, got {value!r:.40}")
    return {"role": role, "content": check_text(node.get("text"), f"{what}, 'text'")}
