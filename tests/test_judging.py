"""Rewards beside generation and scoring: the numbers of one after the other, sooner; no stop waits for them twice."""

import json
import multiprocessing
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from lowrank_rlhf import cli, rollout
from lowrank_rlhf.backbone.tiny import tiny_tokenizer
from lowrank_rlhf.config import Data, PPORecipe
from lowrank_rlhf.config_grpo import GRPORecipe
from lowrank_rlhf.data import Example, Renderer, Sequence
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.loader import load_recipe
from lowrank_rlhf.rewards import FunctionReward, Judging, Scored, Weighted, WeightedSum, Worker
from lowrank_rlhf.stages import on_policy
from lowrank_rlhf.stages.grpo import GRPO
from lowrank_rlhf.stages.ppo import PPO
from tests import reward_functions
from tests.chat_server import serving

ROOT = Path(__file__).parent.parent
RENDERER = Renderer(tiny_tokenizer(), Data(train="unused"))
OVERLAPS = ("none", "scoring", "generation")
PATIENCE = 30  # seconds for what comes at once unless it never comes

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["lowrank_rlhf.stages.grpo"])


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


SETTINGS = [
    "base.model=tiny",
    "base.quantization=none",
    "base.device=cpu",
    "data.train=tests/learning_prompts.jsonl",
    "data.max_prompt_tokens=16",
    "data.max_completion_tokens=8",
    "reward=tests.reward_functions:lowercase",
    "train.micro_batch_size=4",
    "train.learning_rate=3e-3",
]


def grpo(*overrides):
    """Two prompts with four answers each, generated three at a time: batches cut the groups."""
    settings = [*SETTINGS, "train.batch_size=2", "grpo.group_size=4", "rollout.batch_size=3", *overrides]
    return GRPO(load_recipe(GRPORecipe, overrides=settings))


def ppo(*overrides):
    """Eight prompts, generated two at a time."""
    settings = [*SETTINGS, "train.batch_size=8", "rollout.batch_size=2", "ppo.minibatches=1", *overrides]
    return PPO(load_recipe(PPORecipe, overrides=settings))


@pytest.fixture
def reward(monkeypatch):
    """Put a function with an `overlap` in the place of the reward."""

    def put(function, overlap):
        monkeypatch.setattr(function, "overlap", overlap, raising=False)
        monkeypatch.setattr(reward_functions, "lowercase", function)

    return put


# The same numbers


def trained(build, steps=3):
    """Weights and metrics after some iterations."""
    method = build()
    rows = []
    for step in range(1, steps + 1):
        experiences, metrics = method.collect()
        rows.append({**metrics, **method.update(experiences)})
        method.on_policy.end_iteration(step, metrics["objective/kl"])
    parameters = [p.detach().clone() for role in method.roles for p in method.backbone.parameters(role)]
    return parameters, rows


@pytest.mark.parametrize("build", [grpo, ppo])
def test_whatever_goes_on_beside_a_reward_the_weights_are_the_same(build, reward):
    """To the bit after three iterations, also of a function that draws torch's random numbers beside the scoring."""

    def letters(prompts, completions, **columns):
        return [sum("a" <= c <= "z" for c in text) / 8 for text in completions]

    def noisy(prompts, completions, **columns):
        return [score + float(torch.rand(())) for score in letters(prompts, completions)]

    found = {}
    for function, overlaps in ((letters, OVERLAPS), (noisy, OVERLAPS[:2])):
        for overlap in overlaps:
            reward(function, overlap)
            found[function, overlap] = trained(build)
    for (function, _), (weights, rows) in found.items():
        first_weights, first_rows = found[function, "none"]
        assert rows == first_rows
        assert all(torch.equal(a, b) for a, b in zip(weights, first_weights, strict=True))
    assert found[letters, "none"][1] != found[noisy, "none"][1]
    assert len({row["objective/scores"] for row in found[letters, "none"][1]}) == 3


def rows_of(count):
    """Answers 0, 1, …; every fifth row has a column that the others lack."""
    columns = [{"place": i, **({"rare": i} if i % 5 == 0 else {})} for i in range(count)]
    examples = [Example(f"row {i}", [{"role": "user", "content": f"{i}?"}], columns=columns[i]) for i in range(count)]
    return examples, [
        Sequence([1], RENDERER.tokenizer(str(i), add_special_tokens=False).input_ids) for i in range(count)
    ]


def test_parts_of_a_batch_are_whole_groups_with_the_columns_of_all():
    """Six answers in groups of two come as 5, 0 | 1, 4, 3 | 2: groups 0 and 2 are whole after the second part."""
    seen = []

    def function(prompts, completions, *, rare, **columns):
        seen.append((prompts, completions, {"rare": rare, **columns}))
        return [10.0 * float(text) for text in completions]

    function.overlap = "generation"
    examples, sequences = rows_of(6)
    total = WeightedSum([Weighted("fn", FunctionReward("fn", function, RENDERER), 2.0)])
    judging = Judging(total, Worker(), examples, group_size=2)
    for part in ([5, 0], [1, 4, 3], [2]):
        judging.add({i: sequences[i] for i in part})
    judging.add_rest(sequences)
    scored = judging.result()
    assert seen[:2] == [
        (
            ["0?", "1?", "4?", "5?"],
            ["0", "1", "4", "5"],
            {"place": [0, 1, 4, 5], "rare": [0, None, None, 5]},
        ),
        (["2?", "3?"], ["2", "3"], {"place": [2, 3], "rare": [None, None]}),
    ]
    assert len(seen) == 2
    assert scored == total(examples, sequences) == Scored([0.0, 20.0, 40.0, 60.0, 80.0, 100.0], [0.0] * 6)


def test_sources_that_are_asked_at_different_times_add_up():
    """Weights, parts and their order are those of asking one after the other."""

    def source(name, factor):
        def function(prompts, completions, **columns):
            return [factor * float(text) for text in completions]

        function.overlap = name
        return Weighted(name, FunctionReward(name, function, RENDERER), 1 / factor)

    adapter = Weighted("adapter", lambda examples, sequences: Scored([1.0] * 4, [0.5] * 4), -2.0)
    total = WeightedSum([source("generation", 2), adapter, source("none", 4), source("scoring", 8)])
    examples, sequences = rows_of(4)
    judging = Judging(total, Worker(), examples)
    for part in ([2, 3], [0, 1]):
        judging.add({i: sequences[i] for i in part})
    judging.add_rest(sequences)
    scored = judging.result()
    assert scored == total(examples, sequences)
    assert scored.scores == [3.0 * i - 2 for i in range(4)]
    assert list(scored.parts) == ["generation", "adapter", "none", "scoring"]


# Who is asked when, where


def noting(calls):
    """A reward that notes the thread and the completions of each call, and whether another call was on."""
    busy = threading.Lock()

    def function(prompts, completions, **columns):
        alone = busy.acquire(blocking=False)
        time.sleep(0.01)
        calls.append((threading.current_thread(), len(completions), alone))
        if alone:
            busy.release()
        return [0.0] * len(completions)

    return function


@pytest.mark.parametrize(("overlap", "sizes"), [("none", [8]), ("scoring", [8]), ("generation", [4, 4])])
def test_calls_come_one_at_a_time_in_one_thread(overlap, sizes, reward):
    """Of three batches of three answers, those of groups of four: whole groups only, or all."""
    calls = []
    reward(noting(calls), overlap)
    method = grpo()
    for _ in range(2):
        experiences, _ = method.collect()
    threads, found, alone = zip(*calls, strict=True)
    assert list(found) == sizes * 2
    assert all(alone)
    assert len(set(threads)) == 1
    assert (threads[0] is threading.main_thread()) == (overlap == "none")
    assert ("reward_worker_seconds" in method.on_policy.speed(experiences)) == (overlap != "none")


def test_the_thread_ends_with_its_worker():
    worker = Worker()
    assert worker(lambda: Scored([1.0], [0.0])).result() == Scored([1.0], [0.0])
    thread = worker.thread
    del worker
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_server_gets_a_request_for_each_batch_that_was_generated(local_servers):
    with serving() as server:
        server.script = ['{"scores": [1, 2]}']
        _, metrics = ppo(f"reward={server.url}").collect()
        assert [len(body["completions"]) for _, _, body in server.requests] == [2, 2, 2, 2]
    assert metrics["objective/scores"] == 1.5


def test_another_word_for_overlap_is_refused():
    def function(prompts, completions):
        return []

    function.overlap = "all"
    with pytest.raises(UserError, match=r"^reward: fn.overlap is 'all': expected none or scoring or generation$"):
        FunctionReward("fn", function, RENDERER)


# Beside what


def before(monkeypatch, module, name, action):
    original = getattr(module, name)

    def wrapped(*args, **kwargs):
        action()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapped)


def waiting_for(event, met):
    """A reward that takes until the event, or notes that it did not come."""

    def function(prompts, completions, **columns):
        met.append(event.wait(PATIENCE))
        return [0.0] * len(completions)

    return function


def test_a_reward_is_computed_while_the_next_batch_is_generated(reward, monkeypatch):
    """The first call ends only once the last of four batches has begun."""
    batches, last, met = [], threading.Event(), []
    before(monkeypatch, rollout, "_complete", lambda: batches.append(0) or (len(batches) == 4 and last.set()))
    reward(waiting_for(last, met), "generation")
    ppo().collect()
    assert met == [True] * 4


@pytest.mark.parametrize("what", ["policy_logps", "values"])
def test_a_reward_is_computed_beside_log_probs_and_values(what, reward, monkeypatch):
    begun, met = threading.Event(), []
    before(monkeypatch, *((PPO, what) if what == "values" else (on_policy, what)), begun.set)
    reward(waiting_for(begun, met), "scoring")
    ppo().collect()
    assert met == [True]


def test_slow_rewards_take_less_time_than_one_after_the_other(reward, monkeypatch):
    """Four batches of 0.4 s or more, each judged in 0.4 s: all but the last call can hide; half of it is asked."""

    def slow(prompts, completions, **columns):
        time.sleep(0.2 * len(completions))
        return [0.0] * len(completions)

    before(monkeypatch, rollout, "_complete", lambda: time.sleep(0.4))
    reward(slow, "generation")
    method = ppo()
    started = time.perf_counter()
    experiences, _ = method.collect()
    seconds = time.perf_counter() - started
    figures = method.on_policy.speed(experiences)
    generation, calls = figures["time/generate"], figures["reward_worker_seconds"]
    assert min(generation, calls) >= 1.6
    assert figures["time/reward"] < calls - 0.6
    assert seconds < generation + figures["time/score"] + calls - 0.6


# Failures and stops


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_an_error_of_a_reward_arrives_as_it_was_raised(overlap, reward):
    calls = []

    def function(prompts, completions, **columns):
        calls.append(len(completions))
        if len(calls) == 1:
            raise KeyError("gold")
        return [0.0] * len(completions)

    reward(function, overlap)
    method = ppo()
    with pytest.raises(KeyError, match="gold") as caught:
        method.collect()
    notes = "".join(caught.value.__notes__)
    assert notes.startswith("raised in the reward function tests.reward_functions:lowercase")
    assert ("it ran in a worker thread; set its attribute overlap = 'none'" in notes) == (overlap != "none")
    _, metrics = method.collect()
    assert metrics["objective/scores"] == 0


def test_what_stands_in_the_queue_behind_an_error_is_forgotten(reward, monkeypatch):
    """Of four calls the first fails once all are in the queue, and the second is on when that is found out."""
    calls, scoring, found_out = [], threading.Event(), threading.Event()

    def function(prompts, completions, **columns):
        calls.append(len(completions))
        if len(calls) == 1:
            scoring.wait(PATIENCE)
            raise KeyError("gold")
        found_out.wait(PATIENCE)
        return [0.0] * len(completions)

    before(monkeypatch, on_policy, "policy_logps", scoring.set)
    reward(function, "generation")
    method = ppo()
    with pytest.raises(KeyError, match="gold"):
        method.collect()
    found_out.set()
    method.on_policy.worker(lambda: Scored([], [])).result(PATIENCE)
    assert len(calls) <= 2


def test_a_wrong_answer_ends_the_iteration_before_all_is_generated(reward, monkeypatch):
    batches, failed = [], threading.Event()

    def wrong(prompts, completions, **columns):
        failed.set()
        return [float("nan")] * len(completions)

    before(monkeypatch, rollout, "_complete", lambda: batches.append(0) or (len(batches) > 1 and failed.wait(PATIENCE)))
    reward(wrong, "generation")
    message = "reward: tests.reward_functions:lowercase returned nan for completion 1: not a finite number"
    with pytest.raises(UserError, match=f"^{message}$"):
        ppo().collect()
    assert len(batches) < 4


def child(folder, overlap):
    """Train with a reward that takes until there is a file `go`."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ROOT)

    def hangs(prompts, completions, **columns):
        (folder / "asked").touch()
        while not (folder / "go").exists():
            time.sleep(0.02)
        return [0.0] * len(completions)

    hangs.overlap = overlap
    reward_functions.lowercase = hangs
    settings = [*SETTINGS, "train.batch_size=2", "grpo.group_size=4", "rollout.batch_size=4", "train.max_steps=3"]
    raise SystemExit(cli.main(["grpo", "--config", "recipes/grpo.yaml", "--tiny", *settings, f"run_dir={folder}/run"]))


def wait_for(found):
    deadline = time.monotonic() + 4 * PATIENCE
    while not found():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


@pytest.mark.parametrize("overlap", ["scoring", "generation"])
def test_a_stop_waits_for_a_reward_and_a_second_one_does_not(overlap, tmp_path):
    """SIGTERM while a call hangs: the step ends when the call does. Ctrl-C after it ends the process, call or not."""
    for answered in (False, True):
        folder = tmp_path / str(answered)
        folder.mkdir()
        process = processes.Process(target=child, args=(folder, overlap))
        process.start()
        wait_for((folder / "asked").exists)
        os.kill(process.pid, signal.SIGTERM)
        wait_for(lambda file=folder / "log": "SIGTERM: stopping after this step" in file.read_text())
        if answered:
            (folder / "go").touch()
        else:
            os.kill(process.pid, signal.SIGINT)
        process.join(4 * PATIENCE)
        code = process.exitcode
        process.kill()
        log = (folder / "log").read_text()
        assert code == (128 + signal.SIGTERM if answered else 130), log
        rows = (folder / "run/metrics.jsonl").read_text() if answered else ""
        assert [json.loads(row)["step"] for row in rows.splitlines()] == ([0, 1] if answered else [])
        assert bool(re.search(r"--resume", log)) == answered
