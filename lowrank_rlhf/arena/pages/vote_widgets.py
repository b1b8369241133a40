"""Parts of the voting page: the answers with what can be said of one of them, and the field for a better one."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from lowrank_rlhf.arena.pages import ballot, sides
from lowrank_rlhf.arena.pages.vote_view import LETTERS
from lowrank_rlhf.arena.seat import Seat
from lowrank_rlhf.errors import UserError

STYLE = """
.vote-top { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 14px; color: var(--body-text-color); }
.vote-top h1 { font-size: 1.25em; font-weight: 700; margin: 0 auto 0 0; color: inherit; }
.vote-top .bar { width: 120px; height: 8px; border-radius: 4px; overflow: hidden;
  background: var(--border-color-primary); }
.vote-top .bar i { display: block; height: 100%; background: var(--color-accent); }
.vote-top .count { font-variant-numeric: tabular-nums; }
.vote-top .who, .vote-top a { color: var(--body-text-color-subdued); font-size: var(--text-sm); }
.vote-top a { text-decoration: underline; }
.vote-answer { gap: 8px; }
.vote-answer div:has(.side) { display: flex; flex-direction: column; flex-grow: 1; }
.vote-answer .side { flex-grow: 1; }
.vote-answer .answer-actions { gap: 6px; flex-wrap: nowrap; }
.vote-answer .answer-actions button { flex-grow: 0; font-weight: 400; background: none;
  border: 1px solid var(--border-color-primary); color: var(--body-text-color-subdued); }
.vote-answer .answer-actions button:hover { color: var(--body-text-color); border-color: var(--color-accent); }
#vote-who { align-items: end; }
@media (max-width: 640px) { .vote-top h1 { width: 100%; } .vote-top .bar { flex: 1; } }
"""
HEAD = ballot.HEAD + f"<style>{STYLE}</style>"
THUMBS = {True: "Good", False: "Bad"}
FindSeat = Callable[[str, gr.Request], Seat]


def labelled(text: str, name: str, key: str = "", variant: Any = "secondary") -> gr.Button:
    """A button that is hidden until there is something to do with it; `key` presses it."""
    return gr.Button(
        text,
        variant=variant,
        visible=False,
        elem_id=name,
        elem_classes=["key", f"key-{key}"] if key else None,
        min_width=180 if key else 90,
        scale=1 if variant == "primary" else 0,
    )


def hidden() -> Any:
    return gr.update(visible=False)


class Answers:
    """A frame for each answer, with thumbs and "write a better one" below it, and its rank where there are ranks.

    Attributes:
        texts: the frames.
        outputs: what `visible` and `emptied` update.
    """

    def __init__(self, count: int):
        self.texts: list[gr.HTML] = []
        self.ranks: list[gr.Radio] = []
        self.actions: list[gr.Row] = []
        self.thumbs: list[dict[bool, gr.Button]] = []
        self.improve: list[gr.Button] = []
        with gr.Row(elem_classes="sides"):
            for index in range(count):
                with gr.Column(min_width=300, elem_classes="vote-answer"):
                    self._answer(index, count)
        self.outputs = [*self.texts, *self.ranks, *self.actions]

    def _answer(self, index: int, count: int) -> None:
        letter = LETTERS[index]
        self.texts.append(sides.text_box(elem_id=f"vote-answer-{letter.lower()}", live=True))
        if count > 2:
            ranks = list(range(1, count + 1))
            self.ranks.append(
                gr.Radio(ranks, label=f"Rank of {letter} (1 is the best)", visible=False, elem_id=f"vote-rank-{index}")
            )
        with gr.Row(visible=False, elem_classes="answer-actions") as row:
            named = {up: f"vote-{text.lower()}-{letter.lower()}" for up, text in THUMBS.items()}
            self.thumbs.append(
                {up: gr.Button(t, size="sm", min_width=64, scale=0, elem_id=named[up]) for up, t in THUMBS.items()}
            )
            self.improve.append(gr.Button("Write a better one", size="sm", min_width=150, scale=0))
        self.actions.append(row)

    def visible(self, state: str) -> dict[Any, bool]:
        """What there is to press in a state of the seat."""
        ranks = dict.fromkeys(self.ranks, state == "shown")
        return ranks | dict.fromkeys(self.actions, state in ("shown", "voted"))

    def emptied(self) -> dict[Any, Any]:
        return {rank: gr.update(value=None) for rank in self.ranks}

    def wire(
        self, find: FindSeat, what: list[gr.Textbox], note: gr.HTML, improving: "Improving", now: dict[str, Any]
    ) -> None:
        """Connect the buttons below the answers; `what` are the annotator's name and the id of what the page shows."""
        for index, thumbs in enumerate(self.thumbs):
            for up, button in thumbs.items():
                button.click(_thumb(find, index, up), what, note, **now)
            opened = [improving.group, improving.index, improving.text, note]
            self.improve[index].click(improving.opener(find, index), what, opened, **now)


class Improving:
    """The field in which an annotator writes a better answer than the one it starts with."""

    def __init__(self) -> None:
        self.index = gr.State(0)
        with gr.Column(visible=False, elem_id="vote-improve") as self.group:
            self.text = gr.Textbox(label="A better answer", lines=5, max_lines=30, elem_id="vote-better")
            with gr.Row(elem_classes="ballot-buttons"):
                self.save = gr.Button("Save this answer", variant="primary", elem_id="vote-better-save", min_width=110)
                self.cancel = gr.Button("Cancel", min_width=110)

    def opener(self, find: FindSeat, index: int) -> Callable[..., list[Any]]:
        def start(name: str, drawn: str, request: gr.Request) -> list[Any]:
            shown = find(name, request).comparison
            if shown is None or shown.id != drawn:
                return [gr.skip()] * 4
            label = f"A better answer than {LETTERS[index]}; it becomes an example to learn from"
            return [gr.update(visible=True), index, gr.update(value=shown.answers[index].text, label=label), ""]

        return start

    def wire(self, find: FindSeat, what: list[gr.Textbox], note: gr.HTML, now: dict[str, Any]) -> None:
        """Connect its buttons; `what` as of `Answers.wire`."""

        def save(name: str, drawn: str, index: int, text: str, request: gr.Request) -> list[Any]:
            try:
                seat = find(name, request)
                seat.judges(drawn)
                seat.better(index, text, of=drawn)
            except UserError as error:
                return [gr.skip(), sides.note(_told(error), problem=True)]
            return [hidden(), sides.note(f"Saved: your answer stands as better than {LETTERS[index]}.")]

        self.save.click(save, [*what, self.index, self.text], [self.group, note], **now)
        self.cancel.click(hidden, None, self.group, **now)


def _thumb(find: FindSeat, index: int, up: bool) -> Callable[..., str]:
    def thumb(name: str, drawn: str, request: gr.Request) -> str:
        try:
            seat = find(name, request)
            seat.judges(drawn)
            seat.thumb(index, up, of=drawn)
        except UserError as error:
            return sides.note(_told(error), problem=True)
        return sides.note(f"Saved: {LETTERS[index]} is {'good' if up else 'bad'}.")

    return thumb


def _told(error: UserError) -> str:
    """The message without the id of the vote it begins with, which says nothing to an annotator."""
    text = str(error)
    return text.split(": ", 1)[1] if text.startswith("vote ") and ": " in text else text
