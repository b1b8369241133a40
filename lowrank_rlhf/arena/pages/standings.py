"""The Leaderboard tab: what the votes say so far."""

from typing import Protocol

import gradio as gr
from gradio.context import Context

from lowrank_rlhf.arena.pages.sides import note
from lowrank_rlhf.arena.pages.standings_html import CSS, page
from lowrank_rlhf.arena.statistics.report import HasJudged, leaderboard
from lowrank_rlhf.errors import UserError


class HasStore(Protocol):
    """The app, as far as this tab needs it."""

    @property
    def store(self) -> HasJudged: ...


def standings_tab(arena: HasStore) -> None:
    """Draw the tab; called inside a `gr.Tab`.

    Computed when the page loads, when the tab is opened and on Refresh. It reads the store only, so it never waits for
    a generation.
    """
    with gr.Row(equal_height=True):
        blind = gr.Checkbox(label="Blind votes only", value=False, container=False, elem_id="standings-blind")
        refresh = gr.Button("Refresh", size="sm", scale=0, min_width=120, elem_id="standings-refresh")
    board = gr.HTML(apply_default_css=False, css_template=CSS, js_on_load=None, elem_id="standings")

    def shown(blind_only: bool) -> str:
        try:
            return page(leaderboard(arena.store, blind_only=blind_only))
        except UserError as error:
            return note(f"The votes cannot be read: {error}", problem=True)

    blocks = Context.root_block  # the page that the tab is on
    triggers = [refresh.click, blind.change, *([blocks.load] if blocks is not None else [])]
    if isinstance(tab := board.parent, gr.Tab):
        triggers.append(tab.select)
    gr.on(triggers, shown, blind, board, api_visibility="private", show_progress="hidden", queue=False)
