"""The Runs tab: trainings as they go, and what one of them left behind."""

from typing import Any

import gradio as gr
from gradio.context import Context

from lowrank_rlhf.arena.arena import Arena
from lowrank_rlhf.arena.pages import run_view
from lowrank_rlhf.arena.trainings import Trained, read_runs

SECONDS = 15  # between two looks at a training that goes on


def runs_tab(arena: Arena) -> None:
    """The tab's components and events; call it inside a gr.Tab."""
    folder = arena.options.runs

    with gr.Row():
        refresh = gr.Button("Refresh", size="sm", scale=0, min_width=120)
    table = gr.HTML()
    chosen = gr.Dropdown([], label="Run", interactive=True)
    details = _panels()
    slider, samples = details[2:4]
    timer = gr.Timer(SECONDS, active=False)

    def look(name: str | None) -> list[Any]:
        runs = read_runs(folder)
        trained = [run for run in runs if run.state != "report"]
        shown = _find(runs, name) or next(iter(trained or runs), None)
        names = gr.Dropdown([run.name for run in runs], value=shown.name if shown else None)
        going_on = gr.Timer(active=any(run.state == "running" for run in runs))
        listed = run_view.runs_table(runs, str(folder)) + run_view.problems(arena.catalog.problems)
        return [names, listed, going_on, *_details(shown)]

    def look_again(name: str | None) -> list[Any]:
        arena.rescan()
        return look(name)

    def show(name: str | None) -> list[Any]:
        return _details(_find(read_runs(folder), name))

    def turn(name: str | None, position: float) -> str:
        run = _find(read_runs(folder), name)
        return _samples(run, int(position))[1] if run else ""

    private: dict[str, Any] = {
        "api_visibility": "private",
        "show_progress": "hidden",
        "concurrency_id": "files",
        "concurrency_limit": 4,
    }
    everything = [chosen, table, timer, *details]
    refresh.click(look_again, chosen, everything, **private)
    timer.tick(look, chosen, everything, **private)
    chosen.input(show, chosen, details, **private)
    slider.input(turn, [chosen, slider], samples, **private)
    blocks = Context.root_block
    if blocks is not None:
        blocks.load(look, chosen, everything, **private)


def _panels() -> list[Any]:
    """What is shown of one run, in the order of `_details`."""
    about = gr.HTML()
    with gr.Tabs():
        with gr.Tab("Curves"):
            curves = gr.HTML()
        with gr.Tab("Samples"):
            slider = gr.Slider(0, 1, 0, step=1, label="Which of the steps that were shown", visible=False)
            samples = gr.HTML()
        with gr.Tab("Recipe"):
            recipe = gr.HTML()
        with gr.Tab("Report"):
            report = gr.HTML()
    return [about, curves, slider, samples, recipe, report]


def _find(runs: list[Trained], name: str | None) -> Trained | None:
    """By the names that were found, so that no name is ever made into a path."""
    return next((run for run in runs if run.name == name), None)


def _details(run: Trained | None) -> list[Any]:
    if run is None:
        return ["", "", gr.Slider(visible=False), "", "", ""]
    slider, shown = _samples(run, None)
    return [run_view.overview(run), run_view.curves(run), slider, shown, run_view.recipe(run), run_view.report(run)]


def _samples(run: Trained, position: int | None) -> tuple[gr.Slider, str]:
    """The slider over the steps that have samples, and those of one; without a position, of the last."""
    by_step = run.samples()
    if not by_step:
        empty = "No samples: PPO and GRPO keep two answers every so many steps, in samples.jsonl."
        return gr.Slider(visible=False), f'<div class="empty">{empty}</div>'
    steps = sorted(by_step)
    at = len(steps) - 1 if position is None else min(max(position, 0), len(steps) - 1)
    slider = gr.Slider(0, max(1, len(steps) - 1), at, step=1, visible=len(steps) > 1)
    return slider, f'<p class="muted">Step {steps[at]}</p>{run_view.samples(by_step[steps[at]])}'
