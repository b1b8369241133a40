"""Who answers on the compare tab, and how: a model and its settings for each column."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from lowrank_rlhf.arena.arena import Arena
from lowrank_rlhf.arena.chat.conversation import MAX_COLUMNS
from lowrank_rlhf.arena.pages import sides
from lowrank_rlhf.arena.votes.records import Decoding
from lowrank_rlhf.errors import UserError

NO_REWARD = "none"
PER_COLUMN = 6  # a model and its five settings


class Who:
    """The choices above the columns.

    Attributes:
        settings: the inputs that `read` takes, in its order.
    """

    def __init__(self, arena: Arena):
        self.arena = arena
        names = list(arena.catalog.speakers)
        self.settings: list[Any] = []
        self.speakers: list[gr.Dropdown] = []
        self.slots: list[gr.Column] = []
        with gr.Accordion("Who answers, and how", elem_id="compare-who"):
            with gr.Row(elem_classes="toolbar"):
                self.count = gr.Radio([1, 2, 3, 4], value=2, label="Columns", min_width=190, elem_id="compare-count")
                self.blind = gr.Checkbox(
                    label="Blind",
                    info="shuffled; names after the vote",
                    container=True,
                    min_width=190,
                    elem_id="compare-blind",
                )
                self.reward = gr.Dropdown(
                    [NO_REWARD, *arena.catalog.rewards],
                    value=arena.reward or NO_REWARD,
                    label="Scored by",
                    min_width=160,
                    elem_id="compare-reward",
                )
                self.refresh = gr.Button("Refresh", size="md", min_width=90, elem_id="compare-refresh", scale=0)
            self.settings += [self.count, self.blind]
            with gr.Row(elem_classes="sides"):
                for at in range(MAX_COLUMNS):
                    self._slot(at, names)

    def read(self, values: Sequence[Any]) -> tuple[list[tuple[str, Decoding]], bool]:
        """The values of `settings` as what `Conversation.settle` takes.

        Raises:
            UserError: a number is missing or none.
        """
        count, blind, *rest = values
        slots = [rest[at * PER_COLUMN : (at + 1) * PER_COLUMN] for at in range(int(count))]
        return [_setting(at, *slot) for at, slot in enumerate(slots, start=1)], bool(blind)

    def wire(self, note: gr.HTML, event: dict[str, Any]) -> None:
        """Look for new runs on load and on demand."""
        self.note = note
        outputs = [note, self.reward, *self.speakers]
        page = gr.context.Context.root_block
        assert page is not None
        page.load(self.fill, self.speakers, outputs, **event)
        self.refresh.click(self.rescan, self.speakers, outputs, **event)
        self.count.change(
            lambda count: [gr.update(visible=at < count) for at in range(MAX_COLUMNS)], self.count, self.slots, **event
        )

    def fill(self, *chosen: str | None) -> dict[Any, Any]:
        """The choices of now, and what to do where there is nobody but the base."""
        names = list(self.arena.catalog.speakers)
        values = [name if name in names else names[0] for name in chosen]
        boxes = {box: gr.update(choices=names, value=name) for box, name in zip(self.speakers, values, strict=True)}
        rewards = gr.update(choices=[NO_REWARD, *self.arena.catalog.rewards])
        return boxes | {self.reward: rewards, self.note: self._note()}

    def rescan(self, *chosen: str | None) -> dict[Any, Any]:
        try:
            self.arena.rescan()
        except UserError as error:
            return {self.note: sides.note(str(error), problem=True)}
        return self.fill(*chosen)

    def _slot(self, at: int, names: list[str]) -> None:
        ordered = [*names[1:2], *names[:1], *names[2:]]  # the newest run beside the bare base
        with gr.Column(min_width=250, visible=at < 2) as slot, gr.Group():
            speaker = gr.Dropdown(
                names,
                value=ordered[min(at, len(ordered) - 1)],
                label=f"Model {at + 1}",
                elem_id=f"compare-model-{at + 1}",
            )
            with gr.Accordion("Settings", open=False, elem_id=f"compare-settings-{at + 1}"):
                default = Decoding()
                settings = [
                    gr.Slider(0, 2, default.temperature, step=0.05, label="Temperature", info="0 is greedy"),
                    gr.Slider(0.05, 1, default.top_p, step=0.05, label="Top p"),
                    gr.Slider(1, 2048, default.max_new_tokens, step=1, label="Max tokens"),
                    gr.Number(default.seed, precision=0, label="Seed", minimum=0),
                    gr.Textbox(default.system, lines=2, max_lines=6, label="System prompt", placeholder="none"),
                ]
        self.settings += [speaker, *settings]
        self.speakers.append(speaker)
        self.slots.append(slot)

    def _note(self) -> str:
        catalog = self.arena.catalog
        if len(catalog.speakers) > 1:
            return ""
        left_out = f" {len(catalog.problems)} folders in it cannot be used: see Runs." if catalog.problems else ""
        return sides.note(
            f"No trained model in {self.arena.options.runs}/ yet, so only the bare base answers: train one "
            f"(lowrank-rlhf sft RECIPE) and press Refresh, or start the app with --adapter NAME=DIR.{left_out}"
        )


def _setting(
    at: int, speaker: str | None, temperature: float, top_p: float, max_tokens: int, seed: int | None, system: str
) -> tuple[str, Decoding]:
    if not speaker:
        raise UserError(f"Model {at}: choose one")
    missing = {"temperature": temperature, "top p": top_p, "max tokens": max_tokens, "seed": seed}
    for name, value in missing.items():
        if value is None:
            raise UserError(f"Model {at}, {name}: write a number")
    return speaker, Decoding(float(temperature), float(top_p), int(max_tokens), int(seed or 0), system or "")
