"""The leaderboard tab: what it draws, that names stay text, and that its event is nobody's API."""

import re
from types import SimpleNamespace

import gradio as gr
import pytest
from vote_duels import pair

from lowrank_rlhf.arena.pages.standings import standings_tab
from lowrank_rlhf.arena.pages.standings_html import GROUP, NO_REWARD, UNMET, page
from lowrank_rlhf.arena.statistics.report import leaderboard
from lowrank_rlhf.arena.statistics.words import EMPTY
from lowrank_rlhf.errors import UserError

EVIL = "<script>alert(1)</script>"


def tab(judged):
    with gr.Blocks() as blocks, gr.Tabs(), gr.Tab("Leaderboard"):
        standings_tab(SimpleNamespace(store=SimpleNamespace(judged=judged)))
    return blocks


def drawn(judged):
    (event,) = tab(judged).fns.values()
    return event.fn(False)


def test_the_best_stands_first_with_its_interval():
    html = drawn(lambda: [pair(f"{i}", "good", "bad", "ab"[i % 4 == 0]) for i in range(40)])
    assert re.findall(r'class="name">(\w+)<', html)[:2] == ["good", "bad"]
    (rating, low, high) = re.search(r"<b>(\d+)</b> <small>\[(\d+), (\d+)\]", html).groups()
    assert int(rating) > 1000
    assert int(low) < int(rating) < int(high)
    assert "75%<small>40</small>" in html  # the matrix: 30 of 40
    assert NO_REWARD in html


def test_no_votes_say_what_to_do():
    assert EMPTY in drawn(lambda: [])


def test_names_of_models_and_people_stay_text():
    judged = [pair(f"{i}", EVIL, 'b" onmouseover="x', "a", annotator="<img src=x>") for i in range(3)]
    html = drawn(lambda: judged)
    assert "<script" not in html
    assert "<img" not in html
    assert 'onmouseover="' not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_groups_are_drawn_apart():
    judged = [pair(f"{i}", "a", "b", "ab"[i % 2]) for i in range(12)] + [
        pair(f"{i}", "c", "d", "ab"[i % 2]) for i in range(9)
    ]
    html = page(leaderboard(judged))
    assert html.count(GROUP) == 2
    assert UNMET not in html
    html = page(leaderboard([*judged[:12], pair("p", "e", "e", "a")]))
    assert (html.count(GROUP), html.count(UNMET)) == (1, 1)


def test_a_store_that_cannot_be_read_is_said_on_the_page():
    def broken():
        raise UserError("votes.db: not a vote store")

    html = drawn(broken)
    assert "The votes cannot be read: votes.db: not a vote store" in html
    assert 'role="alert"' in html


def test_it_computes_on_load_on_opening_and_on_refresh_and_is_no_api():
    blocks = tab(lambda: [])
    (event,) = blocks.fns.values()
    assert {name for _, name in event.targets} == {"click", "change", "load", "select"}
    assert event.api_visibility == "private"
    assert event.queue is False


@pytest.mark.parametrize("blind_only", [False, True])
def test_the_checkbox_reaches_the_statistics(blind_only):
    judged = [pair(f"{i}", "x", "y", "a") for i in range(8)] + [
        pair(f"{i}", "x", "y", "b", blind=False) for i in range(20)
    ]
    (event,) = tab(lambda: judged).fns.values()
    first = re.search(r'class="name">(\w+)<', event.fn(blind_only)).group(1)
    assert first == ("x" if blind_only else "y")
