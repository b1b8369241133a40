"""The compare tab: what its events make of a conversation, text that stays text, and the page in a real browser."""

import threading
import time
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
import uvicorn
from browser import chromium, needs_browser
from fastapi import FastAPI
from gradio.helpers import special_args

from lowrank_rlhf.arena.chat.conversation import Conversation
from lowrank_rlhf.arena.chat.engine import Progress
from lowrank_rlhf.arena.pages import ballot, look, sides
from lowrank_rlhf.arena.pages import compare_view as view
from lowrank_rlhf.arena.pages.compare import Compare
from lowrank_rlhf.arena.pages.compare_vote import _signed
from lowrank_rlhf.arena.votes.database import Store
from lowrank_rlhf.arena.votes.records import Speaker
from lowrank_rlhf.errors import UserError

NASTY = [
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "![x](http://evil.example/p.png)",
    "[x](javascript:alert(1)) <http://evil.example> http://evil.example",
    "[x]: http://evil.example 'title'\n\n[x]",
    '```"><script>alert(1)</script>\n</code></pre><b onclick=alert(1)>\n```',
    "`</code><svg/onload=alert(1)>`",
    "<!-- --><style>*{display:none}</style>",
    "| <iframe src=//evil.example> | b |\n|-|-|\n| <b>c | d |",
    "&lt;script&gt; &#60;script&#62; &colon;",
    '"><div style="position:fixed">',
]
TEXT = "one **two** ${three} {{four}} <b>five</b> six seven eight nine ten eleven twelve"
WORDS = TEXT.split(" ")
ALLOWED = {
    "div",
    "span",
    "p",
    "pre",
    "code",
    "ul",
    "li",
    "strong",
    "em",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "br",
}


class Tags(HTMLParser):
    """Collects what a browser would make elements and attributes of."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = set(), set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_comment(self, data):
        self.tags.add("a comment")


def tags_of(html):
    parser = Tags()
    parser.feed(html)
    parser.close()
    return parser


class Engine:
    """Says WORDS, one every `pause` seconds; the second column is one word behind."""

    loaded = True

    def __init__(self, pause=0.0, fails=None):
        self.pause, self.fails = pause, fails

    def stream(self, requests, stop):
        if self.fails:
            raise UserError(self.fails)
        for count in range(1, len(WORDS) + 1):
            time.sleep(self.pause)
            halted, done = stop(), count == len(WORDS)
            said = [" ".join(WORDS[: count - (at if not done else 0)]) for at in range(len(requests))]
            speakers = [Speaker(r.speaker, run=r.speaker, adapter_hash="f" * 64) for r in requests]
            yield [
                Progress(text, count, count * 10, 10, done or halted, done, halted, speaker)
                for text, speaker in zip(said, speakers, strict=True)
            ]
            if halted:
                return

    def score(self, reward, messages, text, system=""):
        if reward == "diverged":
            return float("nan")
        if reward == "broken":
            raise UserError("no reward run 'broken' here")
        return len(text) / 100


@pytest.fixture
def arena(tmp_path):
    return SimpleNamespace(
        options=SimpleNamespace(logins=None, runs=Path("runs")),
        catalog=SimpleNamespace(
            speakers=dict.fromkeys(["base", "ppo", "ppo step 20", "sft"]), rewards={"judge": Path("judge")}, problems=[]
        ),
        engine=Engine(),
        store=Store(tmp_path / "votes.db"),
        reward="judge",
        rescan=lambda: None,
    )


@pytest.fixture(scope="module")
def tab():
    nobody = SimpleNamespace(speakers={"base": None}, rewards={}, problems=[])
    with gr.Blocks():
        return Compare(SimpleNamespace(catalog=nobody, reward=None, options=SimpleNamespace(logins=None)))


@pytest.fixture
def page(tab, arena):
    tab.arena = tab.who.arena = tab.ballot.arena = arena
    return tab


def settings(count=2, blind=False, speakers=("ppo", "base", "sft", "ppo step 20"), seed=0):
    slots = [[speaker, 0.7, 0.95, 64, seed, ""] for speaker in speakers]
    return [count, blind, *(value for slot in slots for value in slot)]


def send(page, conversation, prompt, *values, reward="none"):
    """Press Send and wait; all updates in one, the last of each component."""
    updates = dict(page.begin(conversation, prompt, *(values or settings())))
    for more in page.say(conversation, reward):
        updates |= more
    return updates | page.finish(conversation)


# Text


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("render", [sides.markdown, sides.plain, sides.answer, sides.note])
def test_no_text_becomes_an_element_or_an_address(render, text):
    found = tags_of(render(text))
    assert found.tags <= ALLOWED
    assert found.attributes <= {"class", "dir", "role", "start"}


@pytest.mark.parametrize("text", NASTY)
def test_no_prompt_becomes_an_element_either(text):
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    html = sides.prompt(messages, system=text) + sides.side(text, text, name=text, foot=text) + sides.turns(messages)
    assert tags_of(html).tags <= ALLOWED


def test_text_that_looks_like_gradios_own_templates_stays_as_it_is():
    for text in ("${alert(1)}", "{{value}}", "@children"):
        assert text in sides.markdown(text)
    assert "__i18n__" not in sides.markdown('__i18n__{"key": "x"}') + sides.plain("__i18n__")


def test_markdown_reads_what_models_write():
    html = sides.markdown("a\nb\n\n1. x\n\n```python\n1 < 2\n```\n|a|b|\n|-|-|\n|1|2|\n\n~~no~~")
    assert "a<br />\nb" in html
    assert "<pre><code" in html
    assert "1 &lt; 2" in html
    assert {"ol", "table", "s"} <= tags_of(html).tags


def test_text_beyond_the_limit_is_shown_as_written_and_soon():
    started = time.perf_counter()
    html = sides.answer("*a " * 330_000)
    assert time.perf_counter() - started < 1
    assert "*a *a" in html


def test_an_empty_answer_says_so_and_a_waiting_one_does_not():
    assert "empty answer" in sides.answer(" \n")
    assert "empty answer" not in sides.answer("", "waiting") + sides.answer("", "streaming")


def test_the_look_fetches_nothing():
    assert "http" not in look.CSS + look.HEAD
    assert look.THEME._stylesheets == []
    assert look.THEME._font_css == []


# Events


def test_a_turn_grows_in_all_columns_and_ends_with_scores_and_a_ballot(page):
    conversation = Conversation()
    page.begin(conversation, "hi", *settings())
    grown = list(page.say(conversation, "judge"))
    assert any(page.lives[0] in update and page.lives[1] in update for update in grown)
    updates = grown[-1] | page.finish(conversation)
    assert "twelve" in updates[page.lives[0]]
    assert "reward 0.80" in updates[page.lives[1]]
    assert "ppo" in updates[page.heads[0]]
    assert "base" in updates[page.heads[1]]
    assert updates[page.ballot.group]["visible"]
    assert updates[page.send]["interactive"]
    assert not updates[page.halt]["interactive"]


def test_an_empty_prompt_asks_nobody(page):
    conversation = Conversation()
    assert "prompt is empty" in page.begin(conversation, "  ", *settings())[page.note]
    updates = send(page, conversation, "  ")
    assert conversation.turns == 0
    assert not updates[page.ballot.group]["visible"]


def test_what_the_engine_refuses_is_said_and_the_prompt_stays(page, arena):
    conversation = Conversation()
    send(page, conversation, "hi")
    arena.engine = Engine(fails="the conversation is too long: about 250,000 tokens")
    updates = send(page, conversation, "x" * 1_000_000)
    assert "250,000" in updates[page.note]
    assert updates[page.prompt] == "x" * 1_000_000
    assert conversation.turns == 1
    assert "twelve" in updates[page.lives[0]]
    assert updates[page.ballot.group]["visible"]  # of the turn before
    assert len(view.past(conversation, 0, "x" * 1_000_000)) < 5_000


def test_a_second_send_while_one_is_running_is_refused_and_asks_nobody(page):
    conversation = Conversation()
    page.begin(conversation, "hi", *settings())
    running = page.say(conversation, "none")
    next(running), next(running)
    assert "still being written" in page.begin(conversation, "again", *settings())[page.note]
    list(running)
    assert [set(update) for update in page.say(conversation, "none")] == [{page.note}]
    assert conversation.turns == 1


def test_a_reward_model_that_cannot_score_does_not_lose_the_answers(page):
    conversation = Conversation()
    updates = send(page, conversation, "hi", reward="broken")
    assert "not scored" in updates[page.note]
    assert conversation.turns == 1


def test_a_diverged_reward_model_is_said_and_the_vote_is_taken(page, arena):
    conversation = Conversation()
    updates = send(page, conversation, "hi", reward="diverged")
    assert "not scored" in updates[page.note]
    assert "Saved as" in page.ballot._voter(page, kind="pair", choice="a")(conversation, "ann", 2, [], "")[page.note]
    (judged,) = arena.store.judged()
    assert [answer.score for answer in judged.comparison.answers] == [None, None]


def test_a_stop_in_the_queue_gives_the_buttons_back_and_the_queued_event_asks_nobody(page):
    conversation = Conversation()
    page.begin(conversation, "hi", *settings())
    updates = page.stop(conversation)
    assert updates[page.send]["interactive"]
    assert not updates[page.halt]["interactive"]
    assert [set(update) for update in page.say(conversation, "none")] == [{page.note}]
    assert conversation.turns == 0
    send(page, conversation, "again")
    assert conversation.turns == 1


def test_what_was_stopped_in_the_queue_does_not_take_the_place_of_the_other_kind(page):
    conversation = Conversation()
    send(page, conversation, "hi")
    page.begin(conversation, "more", *settings())
    page.stop(conversation)
    page.begin_again(conversation, "", *settings())
    assert [set(update) for update in page.say(conversation, "none")] == [{page.note}]
    list(page.regenerate(conversation, "none"))
    assert conversation.columns[0].messages[0]["content"] == "hi"
    assert [answer.decoding.seed for answer in conversation.comparison("ann").answers] == [1, 1]
    page.begin_again(conversation, "", *settings())
    page.stop(conversation)
    page.begin(conversation, "more", *settings())
    assert [set(update) for update in page.regenerate(conversation, "none")] == [{page.note}]
    list(page.say(conversation, "none"))
    assert conversation.turns == 2


def test_an_event_dropped_before_anybody_was_asked_frees_the_conversation(page):
    conversation = Conversation()
    page.begin(conversation, "hi", *settings())
    answers = page.say(conversation, "none")
    next(answers)
    answers.close()
    assert not conversation.busy
    send(page, conversation, "again")
    assert conversation.turns == 1


def test_a_stop_of_running_answers_leaves_the_page_to_them(page):
    conversation = Conversation()
    page.begin(conversation, "hi", *settings())
    answers = page.say(conversation, "none")
    next(answers), next(answers)
    assert set(page.stop(conversation)) == {page.note}
    list(answers)
    assert conversation.latest.answers[0].stopped


def test_a_blind_turn_shows_no_name_and_no_score_until_its_vote_is_stored(page, arena):
    conversation = Conversation()
    updates = send(page, conversation, "hi", *settings(blind=True), reward="judge")
    shown = "".join(value for value in updates.values() if isinstance(value, str))
    assert "ppo" not in shown
    assert "base" not in shown
    assert "0.80" not in shown
    vote = page.ballot._voter(page, kind="pair", choice="a")
    told = vote(conversation, "ann", 3, ["clearer"], "ok")
    assert "A is " + conversation.columns[0].speaker in told[page.note]
    assert "reward 0.80" in told[page.lives[0]]
    (judged,) = arena.store.judged()
    assert judged.comparison.blind
    assert [answer.speaker.name for answer in judged.comparison.answers] == [c.speaker for c in conversation.columns]
    (cast,) = judged.votes
    assert (cast.annotator, cast.choice, cast.strength) == ("ann", "a", 3)
    assert (cast.reasons, cast.comment) == (("clearer",), "ok")


def test_after_a_blind_vote_the_ballot_is_closed_until_the_next_prompt(page, arena):
    conversation = Conversation()
    send(page, conversation, "hi", *settings(blind=True))
    told = page.ballot._voter(page, kind="pair", choice="a")(conversation, "ann", None, [], "")
    assert not told[page.ballot.group]["visible"]
    for name in ("ann", "bob"):
        again = page.ballot._voter(page, kind="pair", choice="b")(conversation, name, None, [], "")
        assert "send the next prompt" in again[page.note]
    (judged,) = arena.store.judged()
    assert [(vote.annotator, vote.choice) for vote in judged.votes] == [("ann", "a")]
    assert not page.finish(conversation)[page.ballot.group]["visible"]
    assert send(page, conversation, "next", *settings(blind=True))[page.ballot.group]["visible"]


def test_two_names_by_turns_make_one_comparison_each(page, arena):
    conversation = Conversation()
    send(page, conversation, "hi")
    for name in ("ann", "bob", "ann", "bob"):
        told = page.ballot._voter(page, kind="pair", choice="a")(conversation, name, None, [], "")
        assert not told.get(page.ballot.group)  # of open answers the vote may change
    assert [judged.comparison.annotator for judged in arena.store.judged()] == ["ann", "bob"]


def test_regenerating_after_an_open_vote_takes_the_settings_of_now(page):
    conversation = Conversation()
    send(page, conversation, "hi")
    page.ballot._voter(page, kind="pair", choice="a")(conversation, "ann", None, [], "")
    page.begin_again(conversation, "", *settings(speakers=["sft", "base", "sft", "sft"], seed=7))
    list(page.regenerate(conversation, "none"))
    assert conversation.names == ["sft", "base"]
    assert [answer.decoding.seed for answer in conversation.comparison("ann").answers] == [8, 8]


def test_another_vote_on_the_same_answers_supersedes_the_first(page, arena):
    conversation = Conversation()
    send(page, conversation, "hi")
    for choice in ("a", "tie"):
        page.ballot._voter(page, kind="pair", choice=choice)(conversation, "ann", 2, [], "")
    (judged,) = arena.store.judged()
    assert [(vote.choice, vote.strength) for vote in judged.votes] == [("tie", None)]
    assert not judged.comparison.blind


def test_three_answers_are_ranked_and_a_missing_rank_is_said(page, arena):
    conversation = Conversation()
    send(page, conversation, "hi", *settings(3))
    rank = page.ballot._voter(page, kind="ranking")
    assert "every answer a rank" in rank(conversation, "ann", None, [], "", 1, 2, None, None)[page.note]
    assert list(arena.store.judged()) == []
    rank(conversation, "ann", None, [], "", 2, 1, 2, None)
    (judged,) = arena.store.judged()
    assert judged.votes[0].ranking == (2, 1, 2)


def test_one_answer_gets_a_thumb(page, arena):
    conversation = Conversation()
    send(page, conversation, "hi", *settings(1))
    page.ballot._voter(page, kind="thumb", up=False)(conversation, "ann", None, [], "")
    (judged,) = arena.store.judged("thumb")
    assert judged.votes[0].up is False
    assert judged.votes[0].answer == judged.comparison.answers[0].id


def test_a_vote_without_a_name_or_before_any_answer_is_refused(page, arena):
    conversation = Conversation()
    vote = page.ballot._voter(page, kind="pair", choice="a")
    assert "nothing to vote on" in vote(conversation, "ann", None, [], "")[page.note]
    send(page, conversation, "hi", *settings(blind=True))
    assert "name is empty" in vote(conversation, " ", None, [], "")[page.note]
    assert conversation.hidden
    assert list(arena.store.judged()) == []


def test_who_is_signed_in_votes_and_not_the_name_that_was_typed(page, arena):
    conversation = Conversation()
    send(page, conversation, "hi", *settings(3))
    rank = _signed(page.ballot._voter(page, kind="ranking"))
    inputs = [conversation, "mallory", None, [], "", 1, 2, 3, None]
    filled, *_ = special_args(rank, list(inputs), request=SimpleNamespace(username="ann"))
    rank(*filled)
    (judged,) = arena.store.judged()
    assert (judged.comparison.annotator, judged.votes[0].annotator) == ("ann", "ann")
    assert judged.votes[0].ranking == (1, 2, 3)


def test_settings_without_a_number_are_named(page):
    values = settings()
    values[2 + 4] = None  # the seed of the first column
    assert "Model 1, seed" in page.begin(Conversation(), "hi", *values)[page.note]


def test_nobody_but_the_base_says_what_to_do(page, arena):
    arena.catalog.speakers = {"base": None}
    updates = page.who.fill("gone", "base", "base", "base")
    assert "No trained model in runs/ yet" in updates[page.who.note]
    assert [updates[box]["value"] for box in page.who.speakers] == ["base"] * 4


def test_undo_gives_the_prompt_back(page):
    conversation = Conversation()
    send(page, conversation, "hi")
    updates = page.undo(conversation)
    assert updates[page.prompt] == "hi"
    assert "Write a prompt" in updates[page.lives[0]]
    assert not updates[page.ballot.group]["visible"]


def test_a_model_chosen_after_the_answer_does_not_get_its_name(page):
    conversation = Conversation()
    send(page, conversation, "hi")
    updates = page.settle(conversation, *settings(speakers=["sft", "sft", "sft", "sft"]))
    assert "ppo" in updates[page.heads[0]]
    assert "sft" not in updates[page.heads[0]]


# The browser


@contextmanager
def served(arena):
    with gr.Blocks() as blocks:
        Compare(arena)
    app = FastAPI()
    gr.mount_gradio_app(
        app,
        blocks,
        "/",
        run_history=False,
        footer_links=[],
        theme=look.THEME,
        css=look.CSS,
        head=look.HEAD + ballot.HEAD,
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(10)


@needs_browser
def test_in_a_browser_both_columns_grow_a_stop_stops_and_a_blind_vote_reveals(arena):
    arena.engine = Engine(pause=0.15)
    with served(arena) as url, chromium(390, 844) as browser:
        browser.open(url)
        browser.click("#compare-blind input")
        browser.type("#compare-prompt textarea", "<i>hi</i> ${x}")
        browser.click("#compare-send")
        browser.wait_text("two")
        sizes = set()
        while "twelve" not in browser.text:
            sizes.add(tuple(len(browser.one(f"#compare-side-{side}").text) for side in "ab"))
        assert len({a for a, _ in sizes}) > 3  # both have been seen at several lengths on the way
        assert len({b for _, b in sizes}) > 3
        browser.one("#compare-vote")
        shown = browser.one("#compare-side-a").text + browser.one("#compare-side-b").text
        assert shown.count("one two ${three} {{four}} <b>five</b> six") == 2
        assert shown.count("<i>hi</i> ${x}") == 2
        assert "ppo" not in shown
        assert "base" not in shown
        browser.shift("3")
        browser.keys("1")
        browser.wait_text("Saved as me's vote")
        heads = {browser.one(f"#compare-side-{side} .name").text for side in "ab"}
        assert heads == {"ppo", "base"}
        browser.type("#compare-prompt textarea", "again")
        browser.click("#compare-send")
        browser.wait_text("two")
        browser.click("#compare-stop")
        browser.wait_text("stopped")
        assert "twelve" not in browser.text
        assert browser.overflow() <= 0
        assert browser.errors() == []
        outside = [u for u in browser.requested() if not u.startswith((url, "data:", "blob:", "chrome"))]
        assert outside == []
    assert [(vote.choice, vote.strength) for judged in arena.store.judged() for vote in judged.votes] == [("a", 3)]
