"""Verifiers of other packages: as they are without them, and against the real ones where these are installed."""

import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lowrank_rlhf.cli import main
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.rewards import VERIFIERS, optional
from lowrank_rlhf.rewards.optional import math_verify, reasoning_gym, task_rows

ROOT = Path(__file__).parent.parent


def needs(module, package):
    return pytest.mark.skipif(
        importlib.util.find_spec(module) is None, reason=f"the package {package} is not installed"
    )


needs_math, needs_gym = needs("math_verify", "math-verify"), needs("reasoning_gym", "reasoning-gym")


def test_recipes_can_name_them():
    assert VERIFIERS["math_verify"] is math_verify
    assert VERIFIERS["reasoning_gym"] is reasoning_gym


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("math_verify", "math-verify", "math"), ("reasoning_gym", "reasoning-gym", "gym")]
)
def test_a_package_that_is_not_installed_is_named_before_any_row(name, package, extra, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    optional._task.cache_clear()
    rows = [{"prompt": f"{i}?", "answer": "4", "task": "chain_sum", "config": {}, "index": 0} for i in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["grpo", "--config", "recipes/grpo.yaml", "--tiny", f"run_dir={tmp_path}/run", f"reward={name}"]
    assert main([*arguments, f"data.train={data}", "data.eval=null", "data.eval_fraction=0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name}: needs the package {package} (")
    assert f"pip install {package}, or this project with [{extra}]" in error
    assert not (tmp_path / "run").exists()


def test_the_extras_that_the_messages_name_exist():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'math = ["math-verify' in text
    assert 'gym = ["reasoning-gym' in text


# math-verify


@needs_math
@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        (r"So it is \boxed{\frac{1}{2}}.", "1/2", 1),
        (r"So it is \boxed{0.5}.", r"\frac{1}{2}", 1),
        (r"So it is \boxed{\frac{2}{4}}.", r"$\frac{1}{2}$", 1),
        (r"So it is \boxed{\frac{1}{3}}.", r"\frac{1}{2}", 0),
        (r"$x = 3$", "3", 1),
        ("The answer is 18.", 18, 1),
        ("The answer is 17.", 18, 0),
        ("It is 0.25", 0.25, 1),
        (r"$(x+1)^2$", "x^2+2x+1", 1),
        (r"$\{2, 1\}$", r"\{1, 2\}", 1),
        (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", 1),
        ("I do not know.", "4", 0),
        ("", "4", 0),
    ],
)
def test_mathematics_is_compared_and_not_text(completion, answer, score):
    assert math_verify(["?"], [completion], answer=[answer], level=[3]) == [float(score)]


@needs_math
@pytest.mark.parametrize("bad", [None, True, [1], "", "   "])
def test_an_answer_that_is_no_mathematics_is_told(bad):
    with pytest.raises(UserError, match=r"^math_verify: the column 'answer' holds no mathematics: "):
        math_verify(["?"], ["4"], answer=[bad])


@needs_math
def test_it_scores_outside_of_the_main_thread_too():
    """A reward server may call it from there, where its limits of time cannot be set."""
    found = []
    thread = threading.Thread(target=lambda: found.extend(math_verify(["?"], [r"\boxed{4}"], answer=["4"])))
    thread.start()
    thread.join()
    assert found == [1.0]


# reasoning-gym


@needs_gym
def test_rows_of_a_task_are_scored_by_the_task():
    rows = list(task_rows("chain_sum", 3, seed=7, settings={"min_terms": 2, "max_terms": 2}))
    again = [json.loads(json.dumps(row)) for row in rows]
    columns = {name: [row[name] for row in again] for name in ("answer", "task", "config", "index")}
    right, prompts = columns["answer"], [row["prompt"] for row in again]
    assert len(set(prompts)) == 3
    assert reasoning_gym(prompts, right, **columns) == [1.0] * 3
    assert (
        reasoning_gym(prompts, [f"Well. <answer> {answer} </answer> Yes." for answer in right], **columns) == [1.0] * 3
    )
    assert reasoning_gym(prompts, ["no", "", "<answer>-1</answer>"], **columns) == [0.0] * 3


@needs_gym
def test_a_task_with_many_right_answers_takes_another_one():
    """countdown: any expression that reaches the target counts, here the oracle's with a zero added."""
    (row,) = task_rows("countdown", 1, seed=3, settings={"min_numbers": 3, "max_numbers": 3})
    columns = {name: [row[name]] for name in ("answer", "task", "config", "index")}
    numbers = f"({row['answer']})"
    assert reasoning_gym([""], [row["answer"]], **columns) == [1.0]
    assert reasoning_gym([""], [numbers], **columns) == [1.0]
    assert reasoning_gym([""], ["1 + 1"], **columns)[0] < 0.5


@needs_gym
def test_what_is_wrong_with_a_row_is_told():
    (row,) = task_rows("chain_sum", 1, seed=7, settings={})
    columns = {name: [row[name]] for name in ("answer", "task", "config", "index")}
    for change, words in (
        ({"answer": ["-5"]}, "the installed version gives question 0 of chain_sum the answer .*, not '-5'"),
        ({"index": [9]}, "the column 'index' holds 9: expected 0 to 0"),
        ({"task": ["chain_sun"]}, "the task 'chain_sun' cannot be made"),
        ({"config": [{"min_termz": 2}]}, "the task 'chain_sum' cannot be made: .*min_termz"),
    ):
        with pytest.raises(UserError, match=f"^reasoning_gym: {words}"):
            reasoning_gym([""], ["4"], **{**columns, **change})


@needs_gym
def test_the_script_writes_a_file_that_grpo_trains_on(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "sums.jsonl"
    command = [sys.executable, "recipes/reasoning_gym_task.py", "chain_sum", "--rows", "12", "--out", str(out)]
    done = subprocess.run([*command, "max_terms=2", "--ask", "A number."], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 12
    assert all(row["prompt"].endswith(" A number.") for row in rows)
    links = [f"data.train={out}", "data.eval=null", "reward=reasoning_gym", f"run_dir={tmp_path}/run"]
    assert main(["grpo", "--config", "recipes/grpo.yaml", "--tiny", *links]) == 0
    for wrong, words in ((["max_terms"], "is written key=value"), (["max_terms=0"], "cannot be made")):
        failed = subprocess.run([*command, *wrong], capture_output=True, text=True)
        assert failed.returncode == 2
        assert words in failed.stderr
