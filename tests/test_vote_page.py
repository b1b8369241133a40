"""The voting page as a browser and a program get it: blind until the vote, to the last byte that the server sends."""

import json
import threading
import time
import uuid

import httpx
import pytest
from arena_fakes import HASH, SECRETS, App, in_thread
from browser import chromium, needs_browser
from gradio_client import Client
from gradio_client.exceptions import AppError

from lowrank_rlhf.arena.pages import look
from lowrank_rlhf.arena.pages.ballot import CHOICES
from lowrank_rlhf.arena.pages.vote import voting_page
from lowrank_rlhf.arena.pages.vote_widgets import HEAD
from lowrank_rlhf.errors import UserError

HIDDEN = (*SECRETS, "marmot-reward", HASH, "votes.db")  # of models, scores and files


@pytest.fixture
def served(tmp_path):
    """A function that serves the page of an app of fakes and gives (app, address)."""
    pages = []

    def serve(prompts=("one", "two", "three"), **options):
        app = App(tmp_path, prompts, **{"reward": "marmot-reward", "repeats": 0, **options})
        page = voting_page(app)
        pages.append(page)
        _, url, _ = page.launch(
            prevent_thread_lock=True, quiet=True, run_history=False, ssr_mode=False,
            theme=look.THEME, css=look.CSS, head=look.HEAD + HEAD,
        )  # fmt: skip
        return app, url

    yield serve
    for page in pages:
        page.close()


class Session:
    """What a browser does, with everything that came back kept in `sent`."""

    def __init__(self, url):
        self.http, self.hash, self.sent = httpx.Client(base_url=url, timeout=30), uuid.uuid4().hex, []
        self.config = json.loads(self.get("config"))

    def get(self, path):
        text = self.http.get(path).text
        self.sent.append(text)
        return text

    def events(self, trigger=None):
        """The numbers of the events; `trigger` is the elem_id of the component that starts them."""
        ids = {c["id"]: c["props"].get("elem_id") for c in self.config["components"]}
        for event in self.config["dependencies"]:
            if trigger is None or trigger in [ids.get(target) for target, _ in event["targets"]]:
                yield event

    def fire(self, event, *data):
        """Trigger an event over the queue, and read its stream to the end."""
        values = {c["id"]: c["props"].get("value") for c in self.config["components"]}
        data = [*data, *(values[number] for number in event["inputs"][len(data) :])][: len(event["inputs"])]
        body = {"fn_index": event["id"], "session_hash": self.hash, "data": data, "trigger_id": None}
        answer = self.http.post("gradio_api/queue/join", json=body)
        self.sent.append(answer.text)
        with self.http.stream("GET", "gradio_api/queue/data", params={"session_hash": self.hash}) as stream:
            for line in stream.iter_lines():
                self.sent.append(line)
                if '"process_completed"' in line or '"close_stream"' in line:
                    break

    def press(self, trigger, *data):
        """Fire what a component starts, and the events that follow these."""
        fired = list(self.events(trigger))
        assert fired, trigger
        for event in fired:
            self.fire(event, *data)
        after = {event["id"] for event in fired}
        for event in self.config["dependencies"]:
            if event["trigger_after"] in after:
                self.fire(event, *data)

    @property
    def all(self):
        return "\n".join(self.sent)


def leaks(text):
    return [secret for secret in HIDDEN if secret in text]


def test_nothing_that_is_sent_before_the_vote_names_a_model(served):
    app, url = served()
    session = Session(url)
    for path in ("", "gradio_api/info", "theme.css", "gradio_api/startup-events", "manifest.json"):
        session.get(path)
    session.press("vote-begin", "ana")
    seat_words = app.store.comparisons_of("ana")[0].answers[0].text.split()[:2]
    assert " ".join(seat_words) in session.all  # the answers did come
    for button in ("vote-next", "vote-regenerate", "vote-skip", "vote-ask", "vote-stop", "vote-undo"):
        session.press(button, "ana", "my question")
    votes = [event["id"] for choice in CHOICES for event in session.events(f"vote-{choice}")]
    others = [event for event in session.events() if event["id"] not in votes and event["inputs"]]
    assert len(others) > 10  # thumbs, better answers, whatever the page may send
    for event in others:
        session.fire(event, "ana", app.store.comparisons_of("ana")[-1].id)
    assert app.store.counts()["thumb"] >= 2  # what judges did judge
    assert leaks(session.all) == []
    comparison = app.store.comparisons_of("ana")[-1]
    session.press("vote-a", "ana", comparison.id)
    assert {answer.speaker.name for answer in comparison.answers} <= set(leaks(session.all))  # the test can see them


@pytest.mark.parametrize("trigger", ["vote-a", "thumb", "better"])
def test_a_vote_on_what_the_page_no_longer_shows_is_not_taken(served, trigger):
    app, url = served()
    session = Session(url)
    session.press("vote-begin", "ana")
    seen = app.store.comparisons_of("ana")[0].id
    session.press("vote-skip", "ana", seen)
    events = {
        "vote-a": list(session.events("vote-a")),
        "thumb": list(session.events("vote-good-a")),
        "better": list(session.events("vote-better-save")),
    }[trigger]
    more = [] if trigger != "better" else [0, "My own answer."]
    for event in events:
        session.fire(event, "ana", seen, *more)
    assert "about to be replaced" in session.all
    assert app.store.counts()["votes"] == 0
    for event in events:
        session.fire(event, "ana", app.store.comparisons_of("ana")[1].id, *more)
    assert app.store.counts()["votes"] == 1


@pytest.mark.parametrize("name", SECRETS)
def test_no_name_is_in_the_pages_configuration(tmp_path, name):
    assert name not in json.dumps(voting_page(App(tmp_path, ["one"])).config, default=str)


def test_an_error_of_the_models_names_nobody_on_the_page(served):
    app, url = served()
    app.engine.problem = UserError(f"the adapter of {SECRETS[0]}, {SECRETS[1]} and {SECRETS[2]} is gone")
    session = Session(url)
    session.press("vote-begin", "ana")
    assert "could not answer this prompt" in session.all
    assert leaks(session.all) == []


def test_programs_have_six_endpoints_and_no_more(served):
    _, url = served()
    named = Client(url, verbose=False).view_api(return_format="dict", print_info=False)
    assert set(named["named_endpoints"]) == {"/next", "/vote", "/rank", "/thumb", "/improve", "/undo"}
    assert named["unnamed_endpoints"] == {}


def test_a_program_votes_through_the_whole_queue(served):
    app, url = served()
    client = Client(url, verbose=False)
    for done in range(3):
        shown = client.predict(annotator="ana", api_name="/next")
        assert (shown["done"], shown["total"], len(shown["answers"])) == (done, 3, 2)
        assert leaks(json.dumps(shown)) == []
        assert client.predict(annotator="ana", api_name="/next")["comparison"] == shown["comparison"]
        thumb = client.predict(shown["comparison"], 0, True, annotator="ana", api_name="/thumb")
        better = client.predict(shown["comparison"], 1, "My own.", annotator="ana", api_name="/improve")
        assert leaks(json.dumps([thumb, better])) == []
        vote = {"comparison": shown["comparison"], "choice": "b", "strength": 2, "vote_id": f"mine-{done}"}
        first = client.predict(**vote, annotator="ana", api_name="/vote")
        assert client.predict(**vote, annotator="ana", api_name="/vote") == first
        assert set(first["models"]) <= set(SECRETS)
    assert client.predict(annotator="ana", api_name="/next")["state"] == "finished"
    counts = app.store.counts()
    assert (counts["pair"], counts["thumb"], counts["better"]) == (3, 3, 3)
    client.predict("mine-2", annotator="ana", api_name="/undo")
    assert app.store.counts()["pair"] == 2
    with pytest.raises(AppError, match="the names were shown"):
        client.predict(shown["comparison"], "a", vote_id="mine-3", annotator="ana", api_name="/vote")
    with pytest.raises(AppError, match="it was taken back"):
        client.predict(shown["comparison"], "b", 2, vote_id="mine-2", annotator="ana", api_name="/vote")
    again = client.predict(annotator="ana", api_name="/next")
    assert set(again["answers"]).isdisjoint(shown["answers"])
    last = client.predict(again["comparison"], "a", annotator="ana", api_name="/vote")
    undone = client.predict(last["vote"], annotator="ana", api_name="/undo")
    client.predict(undone["comparison"], "b", annotator="ana", api_name="/vote")
    assert [judged.comparison.blind for judged in app.store.judged("pair")] == [True, True, False]


def test_a_program_ranks(served):
    app, url = served(samples=3)
    client = Client(url, verbose=False)
    shown = client.predict(annotator="ana", api_name="/next")
    client.predict(shown["comparison"], [3, 1, 1], annotator="ana", api_name="/rank")
    assert [j.votes[0].ranking for j in app.store.judged("ranking")] == [(3, 1, 1)]


def test_what_is_wrong_with_a_request_is_its_answer(served):
    _, url = served()
    client = Client(url, verbose=False)
    shown = client.predict(annotator="ana", api_name="/next")
    with pytest.raises(AppError, match="was shown to ben"):
        client.predict(shown["comparison"], "a", annotator="ben", api_name="/vote")
    with pytest.raises(AppError, match="choice: expected a, b, tie, both_bad"):
        client.predict(shown["comparison"], "c", annotator="ana", api_name="/vote")
    with pytest.raises(AppError, match="the name is empty"):
        client.predict(annotator="", api_name="/next")


def test_a_vote_does_not_wait_for_anothers_answer(served):
    app, url = served()
    client = Client(url, verbose=False)
    shown = client.predict(annotator="ana", api_name="/next")
    app.engine.hold = threading.Event()
    other = in_thread(lambda: Client(url, verbose=False).predict(annotator="zoe", api_name="/next"))
    app.study._answered.clear()  # so that zoe's have to be generated
    deadline = time.monotonic() + 20
    while len(app.engine.asked) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(app.engine.asked) == 2
    client.predict(shown["comparison"], "a", annotator="ana", api_name="/vote")
    assert other.is_alive()
    app.engine.hold.set()
    other.join(20)
    assert not other.is_alive()


@needs_browser
@pytest.mark.slow
def test_keys_vote_and_are_letters_while_somebody_types(served):
    app, url = served()
    with chromium() as browser:
        browser.open(url)
        browser.type("#vote-name textarea, #vote-name input", "ana12rn")
        assert app.store.counts()["comparisons"] == 0  # these were letters of a name
        browser.click("#vote-begin")
        browser.one("#vote-a")
        assert leaks(browser.driver.page_source) == []
        browser.click("#vote-why button")
        browser.type("#vote-comment textarea, #vote-comment input", "1 is too long")
        assert app.store.counts()["votes"] == 0
        browser.keys("r")
        browser.wait(lambda: len(app.engine.asked) == 2, about="answers written again")
        browser.wait(lambda: len(app.store.comparisons_of("ana12rn")) == 2)
        browser.one("#vote-a")
        browser.shift("3")
        browser.wait(lambda: browser.driver.find_elements("css selector", "#vote-strength input:checked"))
        browser.keys("2")
        browser.wait_text("You chose B")
        (judged,) = app.store.judged()
        assert (judged.votes[0].choice, judged.votes[0].strength) == ("b", 3)
        for answer in judged.comparison.answers:
            assert answer.speaker.name in browser.text
        browser.wait_text("reward")
        browser.keys("n")
        browser.one("#vote-tie")
        browser.keys("3")
        browser.wait_text("Saved: a tie")
        assert (browser.overflow(), browser.errors()) == (0, [])


@needs_browser
@pytest.mark.slow
def test_markup_in_prompt_and_answer_stays_text(served):
    _, url = served(prompts=("<img src=x onerror=document.title='owned'> ${1+1} {{x}}",))
    with chromium(390, 844, dark=True) as browser:
        browser.open(url)
        browser.type("#vote-name textarea, #vote-name input", "<b>ana</b>")
        browser.click("#vote-begin")
        browser.one("#vote-a")
        browser.wait_text("<img src=x onerror=document.title='owned'> ${1+1} {{x}}")
        assert "<b>ana</b>" in browser.text
        assert browser.driver.title == "Which answer is better?"
        assert browser.overflow() == 0
