"""The workbench: compare, leaderboard, runs and export on one page; for owners, since it shows every name."""

import gradio as gr

from lowrank_rlhf.arena.arena import Arena
from lowrank_rlhf.arena.pages.compare import compare_tab
from lowrank_rlhf.arena.pages.exports_tab import exports_tab
from lowrank_rlhf.arena.pages.runs import runs_tab
from lowrank_rlhf.arena.pages.sides import plain
from lowrank_rlhf.arena.pages.standings import standings_tab

CSS = """
.top { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 18px; color: var(--body-text-color); }
.top b { font-size: 1.15em; } .top a, a.download { color: var(--color-accent); text-decoration: underline; }
@media (max-width: 640px) { .tab-container button { padding-inline: 8px; font-size: var(--text-sm); } }
.top span { color: var(--body-text-color-subdued); font-size: var(--text-sm); }
"""


def workbench(arena: Arena) -> gr.Blocks:
    """The page at /: every tab over one arena."""
    with gr.Blocks(title="lowrank-rlhf", analytics_enabled=False, fill_width=True) as page:
        top = gr.HTML(_top(None))
        with gr.Tabs():
            with gr.Tab("Compare"):
                compare_tab(arena)
            with gr.Tab("Leaderboard"):
                standings_tab(arena)
            with gr.Tab("Runs"):
                runs_tab(arena)
            with gr.Tab("Export"):
                exports_tab(arena)
        page.load(_greeting, None, top, api_visibility="private", show_progress="hidden")
    return page


def _greeting(request: gr.Request) -> str:
    return _top(request.username)


def _top(name: str | None) -> str:
    """The line above the tabs, with the name of who is signed in."""
    signed_in = f'<span>{plain(name)}</span><a href="/logout">Sign out</a>' if name else ""
    return f'<div class="top"><b>lowrank-rlhf</b><a href="/vote/">Blind voting</a>{signed_in}</div>'
