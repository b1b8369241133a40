"""The Export tab: votes as data sets to train on, with their card, and their files as one download."""

from typing import Any

import gradio as gr
from gradio.context import Context

from lowrank_rlhf.arena.arena import Arena
from lowrank_rlhf.arena.exporting import Exports
from lowrank_rlhf.arena.pages.sides import markdown, plain
from lowrank_rlhf.arena.votes.exports import ExportReport
from lowrank_rlhf.errors import UserError

NOTHING = '<div class="empty">Nothing exported yet.</div>'


def exports_tab(arena: Arena) -> None:
    """The tab's components and events; call it inside a gr.Tab."""
    exports = Exports(arena.store)
    gr.HTML(
        f'<p class="muted">Votes become preference, K-wise, unpaired, demonstration and prompt files, split by prompt, '
        f"in {plain(str(exports.folder))}/NAME.</p>"
    )
    with gr.Row():
        name = gr.Textbox("votes", label="Name", max_lines=1, max_length=64, min_width=160)
        share = gr.Slider(0, 0.5, 0.1, step=0.05, label="Share of prompts held out for evaluation", min_width=200)
        with gr.Column(min_width=200):
            blind = gr.Checkbox(label="Blind votes only")
            overwrite = gr.Checkbox(label="Replace an export of this name")
    make = gr.Button("Export", variant="primary")
    result = gr.HTML()
    there = gr.Dropdown([], label="Exports", interactive=True)
    card = gr.HTML(NOTHING)

    def export(name: str, share: float, blind: bool, overwrite: bool) -> tuple[Any, ...]:
        name = (name or "").strip()
        try:
            report = exports.make(name, eval_fraction=share, blind_only=bool(blind), overwrite=bool(overwrite))
        except UserError as error:
            return f'<div class="note problem">{plain(str(error))}</div>', gr.skip(), gr.skip()
        names = gr.Dropdown(exports.names(), value=name)
        return f'<div class="note">{_summary(report)}</div>', names, _card(exports, name)

    def choose(name: str | None) -> str:
        return _card(exports, name) if name else NOTHING

    def look() -> tuple[Any, ...]:
        names = exports.names()
        newest = names[0] if names else None
        return gr.Dropdown(names, value=newest), choose(newest)

    private: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "files", "concurrency_limit": 4}
    make.click(export, [name, share, blind, overwrite], [result, there, card], **private)
    there.input(choose, there, card, show_progress="hidden", **private)
    blocks = Context.root_block
    if blocks is not None:
        blocks.load(look, None, [there, card], show_progress="hidden", **private)


def _card(exports: Exports, name: str) -> str:
    """The data card of an export and where to get its files."""
    try:
        text = exports.card(name)
    except UserError as error:
        return f'<div class="note problem">{plain(str(error))}</div>'
    link = f'<p><a class="download" href="/downloads/{plain(name)}.zip" download>Download {plain(name)}.zip</a></p>'
    return f'{link}<div class="report answer">{markdown(text)}</div>'


def _summary(report: ExportReport) -> str:
    """What was written, and what was not and why."""
    lines = {"Rows": report.files, "Left out": report.left_out}
    shown = [
        f"{name}: {', '.join(f'{what} {n}' for what, n in counts.items()) or 'none'}" for name, counts in lines.items()
    ]
    return "<br>".join(plain(line) for line in [f"{report.votes} votes in {report.folder}", *shown])
