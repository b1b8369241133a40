"""The compare tab: up to four columns answer one prompt at once, turn after turn, and a vote on what they said."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from lowrank_rlhf.arena.arena import Arena
from lowrank_rlhf.arena.chat.conversation import MAX_COLUMNS, Conversation
from lowrank_rlhf.arena.chat.engine import Progress
from lowrank_rlhf.arena.pages import compare_view as view
from lowrank_rlhf.arena.pages import sides
from lowrank_rlhf.arena.pages.compare_vote import Ballot
from lowrank_rlhf.arena.pages.compare_who import NO_REWARD, Who
from lowrank_rlhf.errors import UserError

MODEL = "model"  # the concurrency_id of every event that uses the base
# In a blind conversation the next key is a vote; otherwise it is the next prompt
LEAVE_THE_BOX = "(blind) => { if (blind) document.activeElement?.blur(); }"
PAUSE_SECONDS = 0.08  # between two updates of a page while an answer grows

Updates = dict[Any, Any]  # component → its new value, as gradio takes them


def compare_tab(arena: Arena) -> None:
    """Lay the tab out in the surrounding Blocks and connect it."""
    Compare(arena)


class Compare:
    """The tab's components; the methods below them are its events, each from a session's conversation to updates."""

    def __init__(self, arena: Arena):
        self.arena = arena
        self.conversation = gr.State(Conversation())
        self.who = Who(arena)
        with gr.Row(elem_classes="sides", equal_height=True):
            self.columns, self.heads, self.pasts, self.lives = zip(*map(_side, range(MAX_COLUMNS)), strict=True)
        self.note = sides.text_box(elem_id="compare-note", elem_classes=["message-line"])
        self.ballot = Ballot(arena)
        self.prompt = gr.Textbox(
            label="Prompt",
            show_label=False,
            placeholder="Ask all of them. Enter sends, Shift+Enter starts a new line.",
            lines=1,
            max_lines=12,
            autofocus=True,
            elem_id="compare-prompt",
        )
        with gr.Row(elem_classes="buttons"):
            self.send = gr.Button("Send", variant="primary", elem_id="compare-send", size="md", min_width=100)
            self.halt = gr.Button(
                "Stop", variant="stop", elem_id="compare-stop", size="md", min_width=80, interactive=False
            )
            self.again = gr.Button(
                "Regenerate", elem_id="compare-regenerate", elem_classes=["key", "key-r"], size="md", min_width=110
            )
            self.back = gr.Button("Undo", elem_id="compare-undo", size="md", min_width=80)
            self.anew = gr.Button("Clear", elem_id="compare-clear", size="md", min_width=80)
        self._wire()

    def _wire(self) -> None:
        state, who = self.conversation, self.who
        shown = [*self.columns, *self.heads, *self.pasts, *self.lives, self.note, self.ballot.group, *self.ballot.shown]
        buttons = [self.send, self.halt, self.again, self.back, self.anew, who.count, who.blind]
        everything = [*shown, *buttons, self.prompt]
        model: dict[str, Any] = {
            "concurrency_id": MODEL,
            "concurrency_limit": 1,
            "api_visibility": "private",
            "show_progress": "hidden",
        }
        store: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        for triggers, begin, answer in (
            ([self.send.click, self.prompt.submit], self.begin, self.say),
            ([self.again.click], self.begin_again, self.regenerate),
        ):
            begun = gr.on(triggers, begin, [state, self.prompt, *who.settings], everything, **store)
            answered = begun.then(answer, [state, who.reward], everything, **model)
            answered.then(self.finish, [state], everything, **store)
            begun.then(None, [who.blind], None, js=LEAVE_THE_BOX, **store)
        self.halt.click(self.stop, [state], everything, **store)
        self.back.click(self.undo, [state], everything, **store)
        self.anew.click(self.clear, [state], everything, **store)
        gr.on([who.count.change, who.blind.change], self.settle, [state, *who.settings], everything, **store)
        who.wire(self.note, store)
        self.ballot.wire(self, everything, store)

    # Events

    def begin(self, conversation: Conversation, prompt: str, *settings: Any) -> Updates:
        """Claim the conversation for a prompt; `say` follows, and does nothing where this failed."""
        if not prompt.strip():
            return self.say_problem("The prompt is empty: write what they are to answer.")
        try:
            conversation.settle(*self.who.read(settings))
            conversation.begin(prompt)
        except UserError as error:
            return self.say_problem(str(error))
        return self._begun(conversation) | {self.prompt: ""}

    def begin_again(self, conversation: Conversation, _: str, *settings: Any) -> Updates:
        """Like `begin`, for the latest prompt; a blind conversation whose names were revealed goes on with them."""
        try:
            chosen = self.who.read(settings)
            if not conversation.revealed and len(chosen[0]) == len(conversation.columns):
                conversation.settle(*chosen)
            conversation.begin()
        except UserError as error:
            return self.say_problem(str(error))
        return self._begun(conversation)

    def say(self, conversation: Conversation, reward: str | None) -> Iterator[Updates]:
        prompt = conversation.asking
        yield from self._answer(conversation, lambda: conversation.say(prompt, self.arena.engine), reward, prompt)

    def regenerate(self, conversation: Conversation, reward: str | None) -> Iterator[Updates]:
        yield from self._answer(conversation, lambda: conversation.regenerate(self.arena.engine), reward)

    def finish(self, conversation: Conversation) -> Updates:
        """Show what there is now and give the buttons back, also after an answer that failed."""
        return self.show(conversation) | self._buttons(conversation.busy) | self.ballot.open(conversation)

    def stop(self, conversation: Conversation) -> Updates:
        """End the answers; where nobody has been asked yet, nothing follows that would give the buttons back."""
        conversation.stop()
        return {self.note: gr.skip()} if conversation.busy else self.finish(conversation)

    def undo(self, conversation: Conversation) -> Updates:
        return self._change(conversation, lambda: {self.prompt: conversation.undo() or gr.skip()})

    def clear(self, conversation: Conversation) -> Updates:
        return self._change(conversation, lambda: conversation.clear())

    def settle(self, conversation: Conversation, *settings: Any) -> Updates:
        return self._change(conversation, lambda: conversation.settle(*self.who.read(settings)))

    def go_on_from(self, conversation: Conversation, column: int) -> Updates:
        return self._change(conversation, lambda: conversation.adopt(column))

    # What they show

    def show(self, conversation: Conversation) -> Updates:
        """All columns as they are."""
        updates: Updates = {}
        for at, column in enumerate(self.columns):
            there = at < len(conversation.columns)
            updates[column] = gr.update(visible=there)
            for boxes, what in ((self.heads, view.head), (self.pasts, view.past), (self.lives, view.live)):
                updates[boxes[at]] = what(conversation, at) if there else ""
        return updates

    def say_problem(self, text: str) -> Updates:
        return {self.note: sides.note(text, problem=True)}

    def _begun(self, conversation: Conversation) -> Updates:
        return self.show(conversation) | self._buttons(True) | self.ballot.close() | {self.note: ""}

    def _answer(
        self,
        conversation: Conversation,
        ask: Callable[[], Iterator[list[Progress]]],
        reward: str | None,
        prompt: str | None = None,
    ) -> Iterator[Updates]:
        """The growing answers, and at the end a problem if there was one."""
        # Its begin failed, or it was stopped in the queue; a claim of the other kind since then is answered by its own
        if not conversation.busy or bool(conversation.asking) != (prompt is not None):
            yield {self.note: gr.skip()}
            return
        count, shown = len(conversation.columns), 0.0
        try:
            yield {self.lives[at]: view.waiting(self.arena.engine.loaded) for at in range(count)} | {
                self.pasts[at]: view.past(conversation, at, prompt) for at in range(count) if prompt is not None
            }
        except GeneratorExit:  # the page has gone
            conversation.stop()
            raise
        try:
            for answers in ask():
                if time.monotonic() - shown >= PAUSE_SECONDS:
                    shown = time.monotonic()
                    yield {self.lives[at]: view.live(conversation, at, answer) for at, answer in enumerate(answers)}
        except UserError as error:
            yield self.say_problem(str(error)) | ({self.prompt: prompt} if prompt else {})
            return
        yield {self.lives[at]: view.live(conversation, at) for at in range(count)} | self._score(conversation, reward)

    def _score(self, conversation: Conversation, reward: str | None) -> Updates:
        """Score the latest answers; a reward model that cannot is a note, not a failure of the turn."""
        if reward in (None, NO_REWARD) or conversation.latest is None:
            return {}
        try:
            conversation.score(reward, self.arena.engine.score)
        except UserError as error:
            return self.say_problem(f"The answers are not scored: {error}")
        return {}

    def _change(self, conversation: Conversation, change: Callable[[], Updates | None]) -> Updates:
        try:
            updates = change() or {}
        except UserError as error:
            return self.say_problem(str(error))
        return self.show(conversation) | self.ballot.open(conversation) | {self.note: ""} | updates

    def _buttons(self, busy: bool) -> Updates:
        idle = [self.send, self.again, self.back, self.anew, self.who.count, self.who.blind]
        return {button: gr.update(interactive=not busy) for button in idle} | {self.halt: gr.update(interactive=busy)}


def _side(at: int) -> tuple[gr.Column, gr.HTML, gr.HTML, gr.HTML]:
    """The frame of a column: who it is, its turns so far and, apart, the answer that grows, sent at every token."""
    with gr.Column(
        min_width=250, elem_classes="side side-column", visible=at < 2, elem_id=f"compare-side-{'abcd'[at]}"
    ) as side:
        head = sides.text_box(view.letter(at), elem_classes=["side-head"])
        past = sides.text_box()
        live = sides.text_box(view.nothing(at), live=True)
    return side, head, past, live
