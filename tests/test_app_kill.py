"""Fifty annotators vote two thousand times while the server is killed five times; no vote is lost or counted twice."""

import json
import random
import socket
import sqlite3
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import CancelledError, ThreadPoolExecutor

import httpx
import pytest
from app_server import App
from chat_runs import edit, write_run
from gradio_client import Client

from lowrank_rlhf.arena.votes.database import Store

ANNOTATORS, VOTES_EACH = 50, 40
KILL_AFTER = (250, 600, 950, 1300, 1700)  # acknowledged votes
PATIENCE_SECONDS = 2400


class Server:
    """The app on one port and one store, as often as it is killed."""

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder, self.kills = folder, 0
        self.app = self.start()

    def start(self):
        flags = ("--port", str(self.port), "--prompts", "prompts.jsonl", "--models", "sft", "ppo", "--repeats", "0.05")
        return App("--store", "votes.db", *flags, cwd=self.folder)

    def kill(self):
        self.app.process.kill()
        self.app.process.wait()
        self.kills += 1
        self.app = self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/vote/"


class Annotator:
    """Votes like a patient person: asks again, and sends the same vote again, until there is an answer."""

    def __init__(self, server, name, acknowledged, end):
        self.server, self.name, self.acknowledged, self.end = server, name, acknowledged, end
        self.client = None
        self.sent = {}

    def work(self):
        for _ in range(VOTES_EACH):
            task = self.call("/next", annotator=self.name)
            assert task["state"] == "shown", task
            vote = {"choice": random.choice(["a", "b", "tie", "both_bad"]), "vote_id": uuid.uuid4().hex}
            vote["strength"] = random.randint(1, 4) if vote["choice"] in ("a", "b") else None
            self.sent[vote["vote_id"]] = (task["comparison"], vote["choice"])
            reply = self.call("/vote", comparison=task["comparison"], annotator=self.name, **vote)
            assert reply["vote"] == vote["vote_id"]
            self.acknowledged.append(vote["vote_id"])

    def call(self, api_name, **arguments):
        while time.monotonic() < self.end:
            try:
                if self.client is None:
                    # Without the certificates that it would read for each request: half of a core's time
                    self.client = Client(self.server.url, verbose=False, analytics_enabled=False, ssl_verify=False)
                return self.client.predict(api_name=api_name, **arguments)
            except (httpx.HTTPError, OSError, ValueError, CancelledError) as error:
                self.client = None  # the server is gone; it comes again
                last = error
                time.sleep(random.uniform(0.2, 1))
        raise AssertionError(f"{self.name}: no answer to {api_name} in time; the last: {last!r}")


@pytest.mark.slow
def test_no_acknowledged_vote_is_lost_or_doubled(tmp_path):
    for seed, stage in enumerate(("sft", "ppo")):
        run = write_run(tmp_path / "runs" / stage, stage, seed=seed)
        edit(run, lambda info: info["recipe"]["data"].update(max_completion_tokens=6))
    rows = [{"prompt": f"Question {i}?"} for i in range(VOTES_EACH + 5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server, acknowledged = Server(tmp_path), []
    end = time.monotonic() + PATIENCE_SECONDS
    people = [Annotator(server, f"annotator {i}", acknowledged, end) for i in range(ANNOTATORS)]
    started = time.monotonic()
    finished = threading.Event()

    def kill_now_and_then():
        for count in KILL_AFTER:
            while len(acknowledged) < count and not finished.is_set():
                time.sleep(0.05)
            if not finished.is_set():
                server.kill()

    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    try:
        with ThreadPoolExecutor(ANNOTATORS) as pool:
            for done in [pool.submit(person.work) for person in people]:
                done.result()
    finally:
        finished.set()
        killer.join()
        server.app.process.kill()
        server.app.process.wait()
    seconds = time.monotonic() - started
    rate = len(acknowledged) / seconds
    print(f"{len(acknowledged)} votes, {server.kills} kills, {seconds:.0f} s, {rate:.1f} votes/s")

    assert server.kills == len(KILL_AFTER)
    assert len(acknowledged) == len(set(acknowledged)) == ANNOTATORS * VOTES_EACH
    store = Store(tmp_path / "votes.db")
    stored = [(vote, entry.comparison) for entry in store.judged() for vote in entry.votes]
    assert Counter(vote.id for vote, _ in stored) == Counter(acknowledged)
    for person in people:
        own = {v.id: (c.id, v.choice) for v, c in stored if v.annotator == person.name}
        assert own == person.sent
        assert len({c.id for v, c in stored if v.annotator == person.name}) == VOTES_EACH
    assert sqlite3.connect(tmp_path / "votes.db").execute("PRAGMA integrity_check").fetchone() == ("ok",)
