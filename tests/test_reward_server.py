"""The reward server, against one in this process: what it is sent, what it may say, whom the token is told."""

import datetime
import json
import socket
import threading

import pytest

from lowrank_rlhf import http_json
from lowrank_rlhf.backbone.tiny import tiny_tokenizer
from lowrank_rlhf.cli import main
from lowrank_rlhf.config import Data
from lowrank_rlhf.data import Example, Renderer, Sequence
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.rewards import ServerReward, reward_function
from lowrank_rlhf.rewards import http as reward_http
from tests.chat_server import serving

pytestmark = pytest.mark.usefixtures("local_servers")

RENDERER = Renderer(tiny_tokenizer(), Data(train="unused"))
EXAMPLES = [
    Example("f, row 1", [{"role": "user", "content": "Hi"}], columns={"answer": "4", "tags": ["a", None]}),
    Example("f, row 2", [{"role": "user", "content": "É?"}], columns={"level": 1}),
]
COMPLETIONS = [Sequence([1], RENDERER.tokenizer("It is 4.")["input_ids"]), Sequence([1], [])]


@pytest.fixture
def server():
    with serving() as server:
        server.script = ['{"scores": [0.5, -1]}']
        yield server


def told(reward):
    with pytest.raises(UserError) as caught:
        reward(EXAMPLES, COMPLETIONS)
    return str(caught.value)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_one_request_carries_the_whole_batch(server):
    reward = reward_function(f"{server.url}/score", RENDERER)
    assert server.requests == []  # being reachable takes no request
    scored = reward(EXAMPLES, COMPLETIONS)
    assert (scored.scores, scored.disagreement, scored.parts) == ([0.5, -1.0], [0.0, 0.0], {})
    body = {
        "prompts": ["Hi", "É?"],
        "completions": ["It is 4.", ""],
        "columns": {"answer": ["4", None], "tags": [["a", None], None], "level": [None, 1]},
    }
    assert server.requests == [("/v1/score", None, body)]


def test_a_busy_or_failing_server_is_asked_four_times(server):
    reward = ServerReward(server.url, RENDERER)
    server.script = [500, 429, 503, '{"scores": [1, 2]}']
    assert reward(EXAMPLES, COMPLETIONS).scores == [1.0, 2.0]
    server.requests.clear()
    server.script = [503]
    assert told(reward) == f'reward: {server.url} cannot be used: status 503: {{"error": "no such thing"}}'
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (400, 'cannot be used: status 400: {"error": "no such thing"}'),
        (404, "cannot be used: status 404"),
        (307, "cannot be used: status 307"),  # the token would go along
        ("<html>Hi</html>", "cannot be used: no JSON came back: <html>Hi</html>"),
        ("", "cannot be used: no JSON came back"),
        ("[" * 100_000, "cannot be used: no JSON came back: [["),
        ("[0.5, 1]", 'sent no {"scores": […]}: [0.5, 1]'),
        ('{"score": [0.5, 1]}', 'sent no {"scores": […]}: {"score": [0.5, 1]}'),
        ("null", 'sent no {"scores": […]}: null'),
        ('{"scores": [0.5]}', "must return a list of 2 numbers, got [0.5]"),
        ('{"scores": [1, 2, 3]}', "must return a list of 2 numbers, got [1, 2, 3]"),
        ('{"scores": 1}', "must return a list of 2 numbers, got 1"),
        ('{"scores": {"0": 1, "1": 2}}', "must return a list of 2 numbers, got {'0': 1, '1': 2}"),
        ('{"scores": [0.5, NaN]}', "returned nan for completion 2: not a finite number"),
        ('{"scores": [-Infinity, 1]}', "returned -inf for completion 1: not a finite number"),
        ('{"scores": [1e999, 1]}', "returned inf for completion 1: not a finite number"),
        ('{"scores": [1, true]}', "returned True for completion 2: not a finite number"),
        ('{"scores": ["0.5", 1]}', "returned '0.5' for completion 1: not a finite number"),
        ('{"scores": [null, 1]}', "returned None for completion 1: not a finite number"),
        ('{"scores": [[1], 1]}', "returned [1] for completion 1: not a finite number"),
    ],
)
def test_what_is_no_score_is_told_at_once_with_the_address(server, reply, words):
    reward = ServerReward(server.url, RENDERER)
    server.script = [reply]
    message = told(reward)
    assert message.startswith(f"reward: {server.url} {words}")
    assert len(message) < 400
    assert len(server.requests) == 1


def hang_up(listener):
    while True:
        try:
            listener.accept()[0].close()
        except OSError:
            return


def test_a_server_that_hangs_up_or_is_silent_is_told(monkeypatch):
    """It listens, so the address is right; and then it says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(reward_http, "TIMEOUT_SECONDS", 0.05)
        assert told(ServerReward(url, RENDERER)) == f"reward: {url} cannot be used: timed out"
        threading.Thread(target=hang_up, args=(listener,), daemon=True).start()
        monkeypatch.setattr(reward_http, "TIMEOUT_SECONDS", 5.0)
        assert told(ServerReward(url, RENDERER)).startswith(f"reward: {url} cannot be used: ")
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:{port}/score", "cannot be reached: "),
        ("http://", "is no address: it names no host"),
        ("http:///score", "is no address: it names no host"),
        ("http://127.0.0.1:port", "is no address: "),
        ("http://127.0.0.1:99999", "is no address: "),
        ("http://[::1", "is no address: "),
        ("http://a..b:80", "cannot be reached: "),
    ],
)
def test_an_address_where_nobody_listens_is_refused_when_it_is_loaded(url, words):
    url = url.format(port=free_port())
    with pytest.raises(UserError) as caught:
        reward_function(url, RENDERER)
    assert str(caught.value).startswith(f"reward: {url} {words}")


def test_behind_a_proxy_only_the_proxy_can_be_reached(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    reward_function("http://reward.example/score", RENDERER)
    with pytest.raises(UserError, match="cannot be reached"):
        reward_function(f"http://127.0.0.1:{free_port()}", RENDERER)  # no_proxy names it


def test_the_token_goes_into_requests_and_into_no_message(server, monkeypatch):
    monkeypatch.setenv("LOWRANK_RLHF_REWARD_TOKEN", "very-secret\n")
    reward = ServerReward(server.url, RENDERER)
    reward(EXAMPLES, COMPLETIONS)
    assert [token for _, token, _ in server.requests] == ["Bearer very-secret"]
    assert "secret" not in repr(vars(reward)) + repr(vars(reward.server))
    padding = "x" * (http_json.SHOWN - 8)  # the cut goes through the token
    for reply in ("Bearer very-secret is unknown", '{"error": "very-secret"}', f"{padding}very-secret"):
        server.script = [reply]
        assert "very" not in told(reward)


def test_a_token_that_no_header_can_hold_is_not_shown(server, monkeypatch):
    monkeypatch.setenv("LOWRANK_RLHF_REWARD_TOKEN", "very\nsecret")
    message = told(ServerReward(server.url, RENDERER))
    assert message == "reward: $LOWRANK_RLHF_REWARD_TOKEN holds characters that no key has; set it again"


def test_a_password_in_the_address_is_refused():
    with pytest.raises(UserError, match=r"leave user and password out of the URL") as caught:
        reward_function("http://me:secret@127.0.0.1/score", RENDERER)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("value", [datetime.date(2026, 1, 1), b"bytes", float("nan"), {("a",): 1}])
def test_a_column_that_is_no_json_is_told_with_its_row_before_any_rollout(server, value):
    reward = ServerReward(server.url, RENDERER)
    examples = [EXAMPLES[0], Example("f, row 2", EXAMPLES[1].prompt, columns={"when": value})]
    reward.check(EXAMPLES)
    with pytest.raises(UserError, match=rf"^f, row 2: reward: {server.url} cannot be sent the column 'when': "):
        reward.check(examples)
    with pytest.raises(UserError, match=rf"^reward: {server.url} cannot be sent the column 'when': "):
        reward(examples, COMPLETIONS)
    assert server.requests == []


def ppo(tmp_path, reward):
    rows = [{"prompt": f"How much is {i} + {i}?", "answer": str(2 * i)} for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.train={tmp_path}/prompts.jsonl", "data.eval_fraction=0"]
    return main(["ppo", "--config", "recipes/ppo.yaml", "--tiny", f"run_dir={tmp_path}/run", f"reward={reward}", *data])


def test_ppo_asks_the_server_once_per_rollout_batch(server, tmp_path):
    server.script = ['{"scores": [1, 2, 3, 4]}']
    assert ppo(tmp_path, server.url) == 0
    bodies = [body for _, _, body in server.requests]
    assert [len(body["completions"]) for body in bodies] == [4, 4]
    assert set(bodies[0]["columns"]) == {"answer"}
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["objective/scores"] == 2.5


def test_ppo_with_a_verifier_or_an_unreachable_server(tmp_path, capsys):
    assert ppo(tmp_path, f"http://127.0.0.1:{free_port()}") == 2
    assert "cannot be reached" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert ppo(tmp_path, "exact_number") == 0
