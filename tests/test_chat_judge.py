"""The judge behind a URL, against a server in this process: what it asks, whom it tells its key, what it survives."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lowrank_rlhf.data import Example
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.evaluation import chat_judge
from lowrank_rlhf.evaluation.chat_judge import ChatJudge

EXAMPLES = [Example(f"row {i}", [{"role": "user", "content": f"How much is {i} + {i}?"}]) for i in range(3)]


class Server:
    """Answers each request with the next of `script`, then always with the last.

    An entry is a status, a text that is sent as it is, or ("said", words of the judge).
    """

    def __init__(self):
        self.script, self.requests = [("said", "[[A]]")], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.path, self.headers.get("Authorization"), None))
                self.reply(200, json.dumps({"data": [{"id": "first-model"}, {"id": "second"}]}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, self.headers.get("Authorization"), body))
                step = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                if isinstance(step, int):
                    self.reply(step, '{"error": "no such thing"}', {"Location": f"{outer.url}/elsewhere"})
                elif isinstance(step, str):
                    self.reply(200, step)
                else:
                    self.reply(200, json.dumps({"choices": [{"message": {"content": step[1]}}]}))

            def reply(self, status, text, headers=None):
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture(autouse=True)
def _fast_and_local(monkeypatch):
    monkeypatch.setattr(chat_judge, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


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
    for said in ("I like both.", "[[A]] or [[B]]", "", None):
        server.script = [("said", said)]
        assert judge.verdict(EXAMPLES[0], "1", "2") == (None, said or "")


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
        ('{"error": 1}', 'not a chat completion: {"error": 1}'),
        ('{"choices": []}', "not a chat completion"),
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


def test_a_password_in_the_url_is_refused():
    with pytest.raises(UserError, match=r"leave user and password out of the URL") as caught:
        ChatJudge("http://me:secret@localhost/v1")
    assert "secret" not in str(caught.value)
