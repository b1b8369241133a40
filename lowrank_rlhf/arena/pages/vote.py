"""The voting page: a prompt, its answers without names, the vote on them, and only then who wrote them."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from lowrank_rlhf.arena.arena import Arena
from lowrank_rlhf.arena.pages import ballot, sides
from lowrank_rlhf.arena.pages import vote_view as view
from lowrank_rlhf.arena.pages.api import add_endpoints
from lowrank_rlhf.arena.pages.guidelines import GUIDELINES
from lowrank_rlhf.arena.pages.vote_widgets import Answers, Improving, hidden, labelled
from lowrank_rlhf.arena.seat import Seat
from lowrank_rlhf.arena.seats import Seats
from lowrank_rlhf.errors import UserError

MODEL = "model"  # the concurrency_id of every event that uses the base
PAUSE_SECONDS = 0.08  # between two updates of a page while answers grow
REMEMBER = "(name) => { localStorage.setItem('annotator', name); return [name]; }"
REMEMBERED = "(name) => [localStorage.getItem('annotator') || name || '']"

Updates = dict[Any, Any]  # component → its new value, as gradio takes them
Step = Callable[..., object]


def voting_page(arena: Arena) -> gr.Blocks:
    """The page at /vote; nothing of it, and nothing it sends, names a model before the vote."""
    with gr.Blocks(title="Which answer is better?", analytics_enabled=False) as page:
        VotingPage(arena, Seats(arena))
    return page


class VotingPage:
    """The page's components, and its events as methods: from a session's seat to updates."""

    def __init__(self, arena: Arena, seats: Seats):
        self.arena, self.seats, self.count = arena, seats, arena.options.samples
        self.top = sides.text_box(view.top(None, (0, 0), False))
        with gr.Accordion("Guidelines", open=True, elem_id="vote-guidelines") as self.guidelines:
            sides.text_box(f'<div class="answer">{sides.markdown(_guidelines(arena.options.guidelines))}</div>')
        with gr.Row(visible=not arena.options.logins, equal_height=True, elem_id="vote-who") as self.who:
            self.name = gr.Textbox(
                label="Your name", placeholder="kept with your votes", max_length=100, elem_id="vote-name", scale=4
            )
            self.begin = gr.Button("Begin", variant="primary", elem_id="vote-begin", min_width=110, scale=1)
        self.prompt = sides.text_box(elem_id="vote-prompt")
        # Comes back with every vote, so that none lands on what its annotator has not seen yet
        self.drawn = gr.Textbox(visible="hidden", elem_id="vote-drawn")
        self.answers = Answers(self.count)
        self.note = sides.text_box(elem_id="vote-note")
        with gr.Column(visible=False, elem_id="vote-ballot") as self.ballot:
            self.strength = ballot.strength_field("vote", visible=self.count == 2)
            self.choices = ballot.choice_buttons("vote") if self.count == 2 else {}
            self.rank = gr.Button("Save the ranking", variant="primary", visible=self.count > 2, elem_id="vote-rank")
            with gr.Accordion("Why (optional)", open=False, elem_id="vote-why"):
                self.reasons, self.comment = ballot.reason_fields("vote")
        with gr.Row(elem_classes="ballot-buttons"):
            self.onward = labelled("Next", "vote-next", "n", variant="primary")
            self.undo = labelled("Undo", "vote-undo")
            self.stop = labelled("Stop", "vote-stop", variant="stop")
            self.again = labelled("Regenerate", "vote-regenerate", "r")
            self.skip = labelled("Skip", "vote-skip")
        self.improving = Improving()
        with gr.Accordion("Ask something of your own", open=False, visible=False, elem_id="vote-own") as self.own:
            self.question = gr.Textbox(
                show_label=False, placeholder="A prompt", lines=2, max_lines=12, elem_id="vote-question"
            )
            self.ask = gr.Button("Ask", elem_id="vote-ask", min_width=110)
        add_endpoints(seats, MODEL)  # first: a private event with a function of the same name would take theirs
        self._wire()

    def _wire(self) -> None:
        fields = ballot.DetailFields(self.strength, self.reasons, self.comment).inputs
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        now = {**private, "queue": False}  # reads and writes the store alone, so it waits for no generation
        model = {**private, "concurrency_id": MODEL, "concurrency_limit": 1, "trigger_mode": "multiple"}
        self.everything = [*self._shown(), *fields]

        def on(trigger: Any, step: Step, inputs: list[Any] | None = None, answer: bool = False, **more: Any) -> None:
            done = gr.on(trigger, self._event(step), [self.name, *(inputs or [])], self.everything, **now, **more)
            if answer:
                done.then(self.write, self.name, self.everything, **model)

        on([self.begin.click, self.name.submit], Seat.next, answer=True, js=REMEMBER)
        on([self.onward.click], Seat.next, answer=True)
        on([self.skip.click], Seat.skip, answer=True)
        on([self.again.click], Seat.regenerate, answer=True)
        on([self.ask.click], Seat.ask, [self.question], answer=True)
        on([self.undo.click], Seat.undo)
        self.stop.click(self._stop, self.name, None, **now)
        what = [self.name, self.drawn]
        judged = [*what, *fields]
        for choice, button in self.choices.items():
            voted = gr.on(button.click, self._event(_chooser(choice)), judged, self.everything, **now)
            voted.then(self.score, self.name, self.answers.texts, **model)
        ranked = self.rank.click(self._event(_rank), [*judged, *self.answers.ranks], self.everything, **now)
        ranked.then(self.score, self.name, self.answers.texts, **model)
        self.answers.wire(self.seat, what, self.note, self.improving, now)
        self.improving.wire(self.seat, what, self.note, now)
        blocks = gr.context.Context.root_block
        assert blocks is not None
        begun = blocks.load(self.arrive, self.name, self.everything, js=REMEMBERED, **now)
        begun.then(self.write, self.name, self.everything, **model)

    def seat(self, name: str, request: gr.Request) -> Seat:
        """Of who is signed in, else of the name that was typed.

        Raises:
            UserError: that is no name.
        """
        return self.seats.of(request.session_hash or "", request.username or name or "")

    def arrive(self, name: str, request: gr.Request) -> Updates:
        """The page as it opens: where the annotator left off, if it is known who that is."""
        if not (request.username or name):
            return {self.name: gr.skip()}
        updates = self._event(Seat.next)(name, request)
        return updates | {self.name: name}

    def write(self, name: str, request: gr.Request) -> Iterator[Updates]:
        """Have the seat's answers written, where it waits for some."""
        if not (request.username or (name or "").strip()):
            yield {self.note: gr.skip()}
            return
        seat, shown = self.seat(name, request), 0.0
        if seat.state != "asked":
            yield {self.note: gr.skip()}
            return
        problem = ""
        try:
            for written in seat.stream():
                if time.monotonic() - shown >= PAUSE_SECONDS:
                    shown = time.monotonic()
                    texts = view.answers(seat, self.count, written)
                    yield dict(zip(self.answers.texts, texts, strict=True))
        except UserError as error:
            problem = str(error)
        if seat.state == "asked" and not problem:
            problem = "Stopped before anything was written. Regenerate asks again, Skip goes on."
        yield self.show(seat) | {self.note: sides.note(problem, problem=True)}

    def score(self, name: str, request: gr.Request) -> Iterator[list[Any]]:
        """Add the reward model's scores to what was revealed."""
        try:
            seat = self.seat(name, request)
            if seat.voted is not None and self.arena.reward:
                seat.score()
                yield view.answers(seat, self.count)
                return
        except UserError as error:
            gr.Warning(f"Not scored: {error}")
        yield [gr.skip()] * self.count

    def show(self, seat: Seat) -> Updates:
        """Everything as the seat has it."""
        state, voted = seat.state, seat.voted
        progress = self.arena.study.progress(seat.annotator)
        visible = {
            self.ballot: state == "shown",
            self.onward: state == "voted",
            self.undo: state == "voted",
            self.stop: state in ("asked", "answering"),
            self.again: state in ("asked", "shown"),
            self.skip: state in ("asked", "shown"),
            self.own: state != "empty",
            self.who: False,
            **self.answers.visible(state),
        }
        texts = view.answers(seat, self.count)
        left = progress[1] - progress[0]
        return {
            **{component: gr.update(visible=shown) for component, shown in visible.items()},
            **dict(zip(self.answers.texts, texts, strict=True)),
            self.onward: gr.update(visible=state == "voted", value=f"Next ({left})" if left else "Next"),
            self.prompt: view.prompt(seat),
            self.drawn: seat.comparison.id if seat.comparison else "",
            self.top: view.top(seat.annotator, progress, self.arena.options.logins is not None),
            self.guidelines: gr.update(open=not (progress[0] or voted)),
            self.note: _remark(seat, bool(self.arena.study.prompts)),
        }

    def _event(self, step: Step) -> Callable[..., Updates]:
        """An event that takes a step with the session's seat, and shows what came of it."""

        def event(name: str, request: gr.Request, *values: Any) -> Updates:  # gradio fills request in by its place
            try:
                seat = self.seat(name, request)
                before = seat.comparison
                step(seat, *values)
                updates = self.show(seat)
            except UserError as error:
                return {self.note: sides.note(str(error), problem=True)}
            if seat.comparison is before:
                return updates
            emptied: Updates = {self.strength: None, self.reasons: [], self.comment: "", self.question: ""}
            return updates | emptied | self.answers.emptied() | {self.improving.group: hidden()}

        return event

    def _stop(self, name: str, request: gr.Request) -> None:
        self.seat(name, request).stop()

    def _shown(self) -> list[Any]:
        buttons = [self.onward, self.undo, self.stop, self.again, self.skip]
        texts = [self.top, self.guidelines, self.who, self.name, self.note, self.prompt, self.drawn]
        return [*texts, *self.answers.outputs, self.ballot, *buttons, self.improving.group, self.own, self.question]


def _chooser(choice: Any) -> Step:
    def choose(seat: Seat, drawn: str, *fields: Any) -> None:
        seat.judges(drawn)
        seat.vote(choice, ballot.details(*fields), of=drawn)

    return choose


def _rank(seat: Seat, drawn: str, strength: None, reasons: list[str], comment: str, *ranks: int | None) -> None:
    given = [rank for rank in ranks if rank is not None]
    if len(given) < len(ranks):
        raise UserError("Give every answer a rank; 1 is the best, and equal ranks are ties.")
    seat.judges(drawn)
    seat.rank(given, ballot.details(None, reasons, comment), of=drawn)


def _remark(seat: Seat, has_queue: bool) -> str:
    if seat.state == "finished":
        return sides.note(view.DONE if has_queue else view.NO_QUEUE)
    if seat.voted is not None:
        return sides.note(view.verdict(seat.voted, [who.name for who in seat.reveal()]))
    if seat.comparison is not None and not seat.comparison.blind:
        return sides.note("Your vote was taken back. Vote again; it will be kept as one that was not blind.")
    return ""


def _guidelines(path: Path | None) -> str:
    """
    Raises:
        UserError: the file cannot be read.
    """
    if path is None:
        return GUIDELINES
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--guidelines: {path} cannot be read as UTF-8 text: {error}") from error
