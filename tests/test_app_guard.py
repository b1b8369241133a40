"""What the guard lets through, before an app that would answer everything."""

import json

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from lowrank_rlhf.arena import logins
from lowrank_rlhf.arena.guard import MAX_BODY_BYTES, Guard
from lowrank_rlhf.arena.logins import Logins, add
from lowrank_rlhf.arena.signin import COOKIE, Sessions, signin_routes

PASSWORD = "correct horse"


def behind(sessions):
    """An app that serves anything at all, which only the guard keeps from doing so."""
    app = FastAPI()
    if sessions:
        app.include_router(signin_routes(sessions))

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE", "OPTIONS"])
    async def everything(path: str, request: Request):
        return {"path": path, "annotator": request.scope["annotator"], "bytes": len(await request.body())}

    app.add_middleware(Guard, sessions=sessions)
    return app


def client(app, host="127.0.0.1:7860", address="127.0.0.1"):
    return TestClient(app, base_url=f"http://{host}", client=(address, 5000), follow_redirects=False)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    path = tmp_path_factory.mktemp("logins") / "logins.jsonl"
    add(path, "olga", PASSWORD, owner=True)
    add(path, "ana", PASSWORD)
    add(path, "ben", PASSWORD)
    return Sessions(Logins.read(path))


@pytest.fixture(scope="module")
def local():
    return client(behind(None))


@pytest.fixture
def signed_in(sessions):
    app = behind(sessions)

    def sign_in(name):
        user = client(app)
        user.cookies.set(COOKIE, sessions.open(name))
        return user

    return sign_in


def test_pages_and_calls_are_open_to_this_machine(local):
    for path in (
        "/",
        "/vote/",
        "/config",
        "/vote/config",
        "/theme.css?v=1",
        "/assets/index-Bq.js",
        "/vote/static/a/b.css",
    ):
        assert local.get(path).status_code == 200, path
    call = local.post("/gradio_api/queue/join", json={"session_hash": "s1", "fn_index": 0, "data": ["x"]})
    assert call.status_code == 200
    assert call.json()["annotator"] is None
    assert call.json()["bytes"] == int(call.request.headers["content-length"])


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=runs/sft/run.json",
        "/vote/gradio_api/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/proxy=http://example.com/",
        "/gradio_api/deep_link?session_hash=s1",
        "/gradio_api/openapi.json",
        "/gradio_api/token",
        "/gradio_api/runs",
        "/gradio_api/call/vote/abc",
        "/gradio_api/upload_progress?upload_id=a",
        "/gradio_api/vibe-code",
        "/gradio_api/dev/reload",
        "/monitoring",
        "/docs",
        "/openapi.json",
        "/static/../app.py",
        "/static/%2e%2e/%2e%2e/app.py",
        "/static/..%2f..%2fapp.py",
        "/vote/%2e%2e/config",
        "/vote//config",
        "/assets/.env",
        "/static/a%00b",
        "/downloads/..zip",
        "/downloads/../votes.zip",
        "/downloads/a/b.zip",
        "/downloads/%2e%2e%2fvotes.zip",
        "/vote/downloads/votes.zip",
    ],
)
def test_everything_else_is_closed(local, path):
    assert local.get(path).status_code in (404, 307)
    assert local.get(path).json()["error"] == "There is nothing here."


@pytest.mark.parametrize(
    "path", ["/gradio_api/upload", "/gradio_api/component_server", "/gradio_api/vibe-edit", "/config"]
)
def test_what_cannot_be_posted(local, path):
    assert local.post(path, json={"session_hash": "s"}).status_code == 404
    assert local.put(path, json={}).status_code == 405
    assert local.delete(path).status_code == 405


def test_without_logins_other_machines_get_nothing():
    app = behind(None)
    for address in ("10.0.0.5", "192.168.1.9", "2001:db8::1"):
        answer = client(app, address=address).get("/")
        assert answer.status_code == 403
        assert "--logins" in answer.json()["error"]
    # An address of this machine that others can reach: what --host 0.0.0.0 would answer on
    assert client(app, host="192.168.1.2:7860").get("/").status_code == 403


def test_a_name_that_points_here_is_refused(local):
    """DNS rebinding: a page of evil.example whose name now resolves to 127.0.0.1."""
    assert local.get("/", headers={"host": "evil.example:7860"}).status_code == 421
    assert local.get("/", headers={"host": "127.0.0.1.evil.example"}).status_code == 421
    assert local.get("/", headers={"host": ""}).status_code == 421
    assert local.get("/", headers={"host": "localhost:9999"}).status_code == 200


def test_posts_of_other_sites_are_refused(local):
    call = {"session_hash": "s", "data": []}
    for origin in ("http://evil.example", "null", "http://127.0.0.1:8000"):
        assert local.post("/gradio_api/queue/join", json=call, headers={"origin": origin}).status_code == 403
    own = {"origin": "http://127.0.0.1:7860"}
    assert local.post("/gradio_api/queue/join", json=call, headers=own).status_code == 200


def test_bodies_have_a_limit(local):
    fits = {"session_hash": "s", "data": ["x" * 2**20]}
    assert local.post("/gradio_api/queue/join", json=fits).json()["bytes"] > 2**20
    too_large = b'"' + b"x" * MAX_BODY_BYTES + b'"'
    assert local.post("/gradio_api/queue/join", content=too_large).status_code == 413
    parts = (too_large[i : i + 2**20] for i in range(0, len(too_large), 2**20))  # without a length in the head
    assert local.post("/gradio_api/queue/join", content=parts).status_code == 413


def test_headers_keep_pages_to_themselves(local):
    for answer in (local.get("/"), local.get("/gradio_api/file=/etc/passwd")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "connect-src 'self'" in policy
        assert "http" not in policy
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
    assert "cache-control" not in local.get("/assets/index-Bq.js").headers


def test_with_logins_nothing_is_served_before_signing_in(sessions):
    user = client(behind(sessions), host="lab.example:7860", address="10.0.0.5")
    assert user.get("/").headers["location"] == "/login"
    assert user.get("/vote/").headers["location"] == "/login"
    for path in ("/config", "/vote/config", "/assets/index.js", "/theme.css", "/downloads/votes.zip", "/nothing"):
        assert user.get(path).status_code == 401, path
    assert user.post("/gradio_api/queue/join", json={"session_hash": "s"}).status_code == 401
    user.cookies.set(COOKIE, "x" * 43)
    assert user.get("/config").status_code == 401


def test_signing_in_and_out(sessions):
    user = client(behind(sessions))
    assert "<form" in user.get("/login").text
    assert user.post("/login", data={"username": "ana", "password": "wrong"}).status_code == 401
    assert user.get("/vote/config").status_code == 401
    answer = user.post("/vote/login", data={"username": "ana", "password": PASSWORD})  # as gradio_client does
    assert answer.status_code == 200
    assert answer.json() == {"success": True}
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert user.get("/vote/config").json()["annotator"] == "ana"
    token = user.cookies[COOKIE]
    assert user.get("/logout").headers["location"] == "/login"
    user.cookies.set(COOKIE, token)
    assert user.get("/vote/config").status_code == 401


def test_a_browser_is_sent_to_what_it_may_see_and_told_what_was_wrong(sessions):
    user = client(behind(sessions))
    accept = {"accept": "text/html"}
    to = {
        name: user.post("/login", data={"username": name, "password": PASSWORD}, headers=accept)
        for name in ("olga", "ana")
    }
    assert to["olga"].headers["location"] == "/"
    assert to["ana"].headers["location"] == "/vote/"
    wrong = user.post("/login", data={"username": "<b>", "password": "wrong"}, headers=accept)
    assert wrong.status_code == 401
    assert "do not belong together" in wrong.text
    assert "<b>" not in wrong.text


def test_guessing_a_password_is_slowed(sessions, monkeypatch):
    monkeypatch.setattr(logins, "_scrypt", lambda password, *_: password)
    app = behind(sessions)
    guesser, other = client(app, address="10.0.0.66"), client(app, address="10.0.0.67")
    statuses = [
        guesser.post("/login", data={"username": "ben", "password": f"guess {n}"}).status_code for n in range(7)
    ]
    assert statuses == [401] * 5 + [429] * 2
    assert other.post("/login", data={"username": "ben", "password": "guess"}).status_code == 401


def test_annotators_have_the_voting_page_alone(signed_in):
    ana, olga = signed_in("ana"), signed_in("olga")
    assert ana.get("/").headers["location"] == "/vote/"
    assert ana.get("/vote/").status_code == 200
    assert ana.get("/vote/config").status_code == 200
    for path in ("/config", "/gradio_api/info", "/theme.css", "/downloads/votes.zip", "/assets/index.js"):
        assert (ana.get(path).status_code, olga.get(path).status_code) == (403, 200), path
    assert ana.post("/gradio_api/queue/join", json={"session_hash": "s-ana"}).status_code == 403
    assert ana.get("/gradio_api/queue/data?session_hash=s-ana").status_code == 403


def test_nobody_acts_in_the_session_of_another(signed_in):
    ana, ben = signed_in("ana"), signed_in("ben")
    join, data = "/vote/gradio_api/queue/join", "/vote/gradio_api/queue/data?session_hash="
    assert ana.post(join, json={"session_hash": "s-ana", "data": []}).json()["annotator"] == "ana"
    assert ana.get(data + "s-ana").status_code == 200
    assert ana.get("/vote/gradio_api/heartbeat/s-ana").status_code == 200
    for path in (join, "/vote/gradio_api/run/predict", "/vote/gradio_api/cancel"):
        assert ben.post(path, json={"session_hash": "s-ana", "data": []}).status_code == 403
        # The last of two keys is the one that counts, for gradio as for the guard
        twice = '{"session_hash": "s-ben", "data": [], "session_hash": "s-ana"}'
        assert ben.post(path, content=twice).status_code == 403
    assert ben.get(data + "s-ana").status_code == 403
    assert ben.get(data + "s-ben&session_hash=s-ana").status_code == 403
    assert ben.get("/vote/gradio_api/heartbeat/s-ana").status_code == 403
    assert ben.post(join, json={"session_hash": "s-ben", "data": []}).json()["annotator"] == "ben"


@pytest.mark.parametrize(
    "body",
    ["", "{", "[]", "{}", '"s"', *(json.dumps({"session_hash": value}) for value in (None, 7, "", "x" * 101, ["s"]))],
)
def test_calls_without_a_session_are_refused(local, signed_in, body):
    assert local.post("/gradio_api/queue/join", content=body).status_code == 400
    assert signed_in("ana").post("/vote/gradio_api/run/predict", content=body).status_code == 400


def test_websockets_are_closed(local):
    with pytest.raises(WebSocketDisconnect) as closed, local.websocket_connect("/gradio_api/queue/join"):
        pass
    assert closed.value.code == 1008


def test_a_proxy_on_this_machine_does_not_open_the_app_to_others():
    """uvicorn takes the address that a local proxy forwards as the client's, so the guard sees who really asks."""
    proxied = client(ProxyHeadersMiddleware(behind(None), trusted_hosts="127.0.0.1"))
    assert proxied.get("/").status_code == 200
    assert proxied.get("/", headers={"x-forwarded-for": "10.0.0.5"}).status_code == 403
