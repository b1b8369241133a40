"""The judge behind a URL, against a server in this process: what it asks, whom it tells its key, what it survives."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lowrank_rlhf.data import Example
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.evaluation.chat_judge import ChatJudge
from tests.chat_server import serving

pytestmark = pytest.mark.usefixtures("local_servers")

EXAMPLES = [Example(f"row {i}", [{"role": "user", "content": f"How much is {i} + {i}?"}]) for i in range(3)]


@pytest.fixture
def server():
    with serving() as server:
        yield server


def test_it_asks_about_each_pair_and_reads_the_side(server):
    judge = ChatJudge(server.url + "/")
    server.requests.clear()
    server.script = [("said", "Answer B is clearer. [[B]]")]
    verdicts = judge(EXAMPLES, ["1 {x}", "2", "3"], ["4", "5", "6"])
    assert [v.first for v in verdicts] == [0.0, 0.0, 0.0]
    paths, keys, bodies = zip(*server.requests, strict=True)
    assert set(paths) == {"/v1/chat/completions"}
    assert set(keys) == {None}
    assert {body["model"] for body in bodies} == {"first-model"}
    asked = sorted(body["messages"][0]["content"] for body in bodies)
    assert "user: How much is 0 + 0?\n\n[Answer A]\n1 {x}\n\n[Answer B]\n4" in asked[0]


def test_nonsense_is_no_verdict_but_what_was_said_is_kept(server):
    judge = ChatJudge(server.url, "mine")
    for said in ("I like both.", "[[A]] or [[B]]", "", None, "NaN", 0.5, [3], {"A": 1}):
        server.script = [("said", said)]
        assert judge.verdict(EXAMPLES[0], "1", "2") == (None, str(said or ""))
    server.script = [("said", "\ud83d?")]
    assert judge.verdict(EXAMPLES[0], "1", "2") == (None, "??")  # what was said goes into report.json


def test_a_busy_or_failing_server_is_asked_again(server):
    judge = ChatJudge(server.url, "mine")
    server.script = [500, 429, 503, ("said", "C")]
    assert judge.verdict(EXAMPLES[0], "1", "2").first == 0.5
    server.script = [500]
    before = len(server.requests)
    with pytest.raises(UserError, match=rf"{server.url}/chat/completions cannot be used: status 500"):
        judge.verdict(EXAMPLES[0], "1", "2")
    assert len(server.requests) - before == 4


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (404, 'cannot be used: status 404: {"error": "no such thing"}'),
        (401, "cannot be used: status 401"),
        (302, "cannot be used: status 302"),
        ("<html>", "no JSON came back"),
        ("[" * 100_000, "no JSON came back"),
        ("null", "sent no chat completion: null"),
        ('{"error": 1}', 'sent no chat completion: {"error": 1}'),
        ('{"choices": []}', "sent no chat completion"),
    ],
)
def test_a_server_that_says_no_is_asked_once_and_told(server, reply, words):
    server.script = [reply]
    with pytest.raises(UserError) as caught:
        ChatJudge(server.url, "mine")
    assert words in str(caught.value)
    assert server.url in str(caught.value)
    assert [path for path, _, _ in server.requests] == ["/v1/chat/completions"]  # nothing went to where it redirects


def test_nobody_there_is_one_clear_error(server):
    nobody = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    url = f"http://127.0.0.1:{nobody.server_port}/v1"
    nobody.server_close()
    with pytest.raises(UserError, match=rf"--judge: {url}/models cannot be used: .*refused"):
        ChatJudge(url)


def test_the_key_goes_into_requests_and_into_no_message(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    judge = ChatJudge(server.url)
    assert {key for _, key, _ in server.requests} == {"Bearer sk-secret"}
    assert "sk-secret" not in repr(vars(judge))
    server.script = [403]
    with pytest.raises(UserError) as caught:
        judge.verdict(EXAMPLES[0], "1", "2")
    assert "sk-secret" not in str(caught.value)


def test_a_key_that_no_header_can_hold_is_not_shown(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    ChatJudge(server.url)
    assert {key for _, key, _ in server.requests} == {"Bearer sk-secret"}
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\nsecret")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds characters that no key has") as caught:
        ChatJudge(server.url)
    assert "secret" not in str(caught.value)


def test_a_password_in_the_url_is_refused():
    with pytest.raises(UserError, match=r"leave user and password out of the URL") as caught:
        ChatJudge("http://me:secret@localhost/v1")
    assert "secret" not in str(caught.value)
