"""The vote under the compare tab's columns: thumbs for one answer, a choice of two, ranks of three and four."""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import gradio as gr

from lowrank_rlhf.arena.arena import Arena
from lowrank_rlhf.arena.chat.conversation import MAX_COLUMNS, Conversation
from lowrank_rlhf.arena.pages import ballot, sides
from lowrank_rlhf.arena.pages import compare_view as view
from lowrank_rlhf.arena.votes.records import Vote
from lowrank_rlhf.errors import UserError

if TYPE_CHECKING:
    from lowrank_rlhf.arena.pages.compare import Compare

DECIDED = ("a", "b")  # the choices that can be strong
THUMBS = {True: "👍 Good", False: "👎 Bad"}
ALONE, PAIR = 1, 2


class Ballot:
    """The vote's components.

    Attributes:
        group: all of them, hidden until there is something to vote on.
        shown: those whose visibility goes with the number of columns.
    """

    def __init__(self, arena: Arena):
        self.arena = arena
        with gr.Column(visible=False, elem_id="compare-vote") as self.group:
            with gr.Column(visible=False) as self.pair:
                self.choices = ballot.choice_buttons("compare")
                strength = ballot.strength_field("compare")
            with gr.Row(visible=False, elem_classes="ballot-buttons") as self.alone:
                self.thumbs = {up: gr.Button(text, size="md", min_width=110) for up, text in THUMBS.items()}
            with gr.Column(visible=False) as self.ranking:
                with gr.Row(elem_classes="ranks"):
                    self.ranks = [_rank(at) for at in range(MAX_COLUMNS)]
                self.rank = gr.Button("Save the ranking", variant="primary", min_width=110, elem_id="compare-rank")
            with gr.Accordion("Why, and by whom", open=False):
                reasons, comment = ballot.reason_fields("compare")
                self.annotator = gr.Textbox("me", label="Your name", visible=not arena.options.logins)
            with gr.Row(elem_classes="ballot-buttons", visible=False) as self.adopting:
                self.adopt = [_adopt(letter) for letter in view.LETTERS]
        self.fields = ballot.DetailFields(strength, reasons, comment)
        self.shown = [self.pair, self.alone, self.ranking, self.adopting, *self.ranks, *self.adopt, *self.fields.inputs]

    def wire(self, page: "Compare", outputs: list[Any], event: dict[str, Any]) -> None:
        """Connect the buttons; `page` shows the conversation."""
        state, details = page.conversation, [self.annotator, *self.fields.inputs]
        for choice, button in self.choices.items():
            button.click(_signed(self._voter(page, kind="pair", choice=choice)), [state, *details], outputs, **event)
        for up, button in self.thumbs.items():
            button.click(_signed(self._voter(page, kind="thumb", up=up)), [state, *details], outputs, **event)
        self.rank.click(_signed(self._voter(page, kind="ranking")), [state, *details, *self.ranks], outputs, **event)
        for at, button in enumerate(self.adopt):
            button.click(lambda conversation, at=at: page.go_on_from(conversation, at), [state], outputs, **event)

    def open(self, conversation: Conversation) -> dict[Any, Any]:
        """What can be voted on now, with an empty ballot."""
        count = len(conversation.columns)
        there = conversation.latest is not None and not conversation.busy and not conversation.closed
        visible = {
            self.group: there,
            self.pair: count == PAIR,
            self.alone: count == ALONE,
            self.ranking: count > PAIR,
            self.adopting: count > ALONE,
        }
        visible |= {box: at < count for boxes in (self.ranks, self.adopt) for at, box in enumerate(boxes)}
        updates = {component: gr.update(visible=shown) for component, shown in visible.items()}
        ranks = {
            box: gr.update(visible=at < count, choices=list(range(1, count + 1)), value=None)
            for at, box in enumerate(self.ranks)
        }
        return updates | ranks | dict(zip(self.fields.inputs, (None, [], ""), strict=True))

    def close(self) -> dict[Any, Any]:
        """Nothing can be voted on while answers are being written, nor after a blind vote."""
        return {self.group: gr.update(visible=False)}

    def _voter(self, page: "Compare", **what: Any) -> Callable[..., dict[Any, Any]]:
        def vote(
            conversation: Conversation,
            name: str,
            strength: int | None,
            reasons: list[str] | None,
            comment: str | None,
            *ranks: int | None,
        ) -> dict[Any, Any]:
            given = asdict(ballot.details(strength, reasons, comment))
            if what.get("choice") not in DECIDED:
                del given["strength"]
            try:
                self._save(conversation, name, ranks, what | given)
            except UserError as error:
                return page.say_problem(str(error))
            conversation.reveal()
            thanks = f"Saved as {name}'s vote: {view.revealed(conversation)}."
            shown = page.show(conversation) | {page.note: sides.note(thanks)}
            return shown | self.close() if conversation.closed else shown

        return vote

    def _save(self, conversation: Conversation, who: str, ranks: tuple[int | None, ...], what: dict[str, Any]) -> None:
        comparison = conversation.comparison(who.strip())
        if what["kind"] == "ranking":
            given = ranks[: len(comparison.answers)]
            if None in given:
                raise UserError("Give every answer a rank; 1 is the best, equal ranks are ties.")
            what |= {"ranking": given}
        if what["kind"] == "thumb":
            what |= {"answer": comparison.answers[0].id}
        self.arena.store.save_comparison(comparison)
        vote = Vote(comparison.id, comparison.annotator, milliseconds=conversation.since_shown(), **what)
        self.arena.store.save_vote(vote)


def _rank(at: int) -> gr.Radio:
    label = f"{view.LETTERS[at]}: rank (1 is best)"
    return gr.Radio(list(range(1, MAX_COLUMNS + 1)), label=label, min_width=150, elem_id=f"compare-rank-{at}")


def _adopt(letter: str) -> gr.Button:
    """Continues every column from one, so that the answers of the next turn are to the same prompt."""
    return gr.Button(
        f"Go on from {letter} everywhere", size="sm", min_width=110, elem_id=f"compare-adopt-{letter.lower()}"
    )


def _signed(vote: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
    """The event with who is signed in for the name; gradio fills a request in by its place, so not after `*ranks`."""

    def event(conversation: Conversation, name: str, request: gr.Request, *values: Any) -> dict[Any, Any]:
        return vote(conversation, request.username or name, *values)

    return event
