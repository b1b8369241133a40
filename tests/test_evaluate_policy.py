"""`evaluate policy` from the command line on the tiny model: what it writes, laws, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest

from lowrank_rlhf.cli import main
from lowrank_rlhf.data import Sequence
from lowrank_rlhf.evaluation import policy
from lowrank_rlhf.evaluation.policy import PolicyEvaluation, compare_policies, read_prompts
from lowrank_rlhf.evaluation.roster import BASE, read_roster
from tests.chat_server import serving

pytestmark = pytest.mark.usefixtures("local_servers")

ROOT = Path(__file__).parent.parent
PROMPTS = [{"prompt": f"How much is {i} + {i}?", "answer": str(2 * i), "must_mention": [str(2 * i)]} for i in range(12)]
TINY = ["--tiny", "base.quantization=none", "train.learning_rate=0.05"]


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An sft run, a ppo run that started from it, and a reward run, all of the tiny model."""
    folder = tmp_path_factory.mktemp("runs")
    start = {"sft": [], "reward": [], "ppo": [f"policy_from={folder}/sft", "reference=auto"]}
    for stage, links in start.items():
        recipe = ["--config", str(ROOT / f"recipes/{stage}.yaml")]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            assert main([stage, *recipe, *TINY, f"run_dir={folder}/{stage}", *links]) == 0
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return folder


@pytest.fixture
def evaluate(runs, tmp_path):
    """Run the verb on the sft and the ppo run; returns the report and the rows of answers.jsonl."""

    def run(*flags, names=("sft", "ppo"), out="out"):
        words = ["--prompts", str(runs / "prompts.jsonl"), "--max-new-tokens", "12", "--out", str(tmp_path / out)]
        assert main(["evaluate", "policy", *(str(runs / name) for name in names), *words, *flags]) == 0
        report = json.loads((tmp_path / out / "report.json").read_text())
        lines = (tmp_path / out / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        return {p["name"]: p for p in report["policies"]}, [json.loads(line) for line in lines], report

    return run


FULL = ["--gold", "recipes.quickstart.gold:gold", "--samples", "2", "--seed", "3"]


def test_the_whole_report(evaluate, runs, tmp_path, capsys):
    policies, rows, report = evaluate("--reward-from", str(runs / "reward"), *FULL)
    assert list(policies) == ["base", "sft", "ppo"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "answers.jsonl",
        "frontier.png",
        "report.json",
        "report.md",
        "scores.png",
    ]
    assert len(rows) == 3 * 12 * 2
    assert list(rows[0]) == [
        *("policy", "prompt", "sample", "completion", "tokens", "ended", "reward", "gold"),
        *("kl_to_base", "kl_to_reference", "preference"),
    ]
    assert (report["prompts"], report["samples"], report["judge"], report["against"]) == (12, 2, "reward", "base")
    for p in policies.values():
        own = [row for row in rows if row["policy"] == p["name"]]
        for key, name in (("reward", "reward"), ("gold", "gold"), ("kl_to_base", "kl_to_base"), ("tokens", "length")):
            figure = p["metrics"][name]
            assert figure["value"] == pytest.approx(sum(row[key] for row in own) / len(own))
            assert figure["low"] <= figure["value"] <= figure["high"]
    text = capsys.readouterr().out
    assert "12 prompts × 2 samples at temperature 1, against base, judged by reward" in text
    assert 90 < max(len(line) for line in text.splitlines() if line.startswith("│ ppo")) <= 110
    page = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert re.search(r"\| ppo \| [+-]\d\.\d\d \[", page)
    assert "coarse filter" in page
    assert "arXiv:2404.04475" in page


def test_the_base_against_itself(evaluate):
    base = evaluate("--reward", "tests.reward_functions:lowercase")[0]["base"]
    assert base["metrics"]["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert base["metrics"]["kl_to_base"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert {d["value"] for d in base["differences"].values()} == {0.0}


def test_a_trained_policy_is_away_from_the_base_and_from_its_own_start(evaluate):
    policies = evaluate()[0]
    assert "reward" not in policies["ppo"]["metrics"]
    assert "win_rate" not in policies["ppo"]["metrics"]
    assert policies["sft"]["metrics"]["kl_to_base"]["value"] > 0.5
    assert "kl_to_reference" not in policies["sft"]["metrics"]  # which is the base
    kl = policies["ppo"]["metrics"]
    assert kl["kl_to_reference"]["value"] != kl["kl_to_base"]["value"]


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(evaluate):
    flags = ["--reward", "tests.reward_functions:lowercase", *FULL]
    first, second = (evaluate(*flags, out=out, names=("ppo",)) for out in "ab")
    assert first == second
    other = evaluate(*flags[:-1], "4", out="c", names=("ppo",))
    assert [row["completion"] for row in other[1]] != [row["completion"] for row in first[1]]


def test_a_copy_of_a_run_wins_half_against_it(evaluate, runs):
    """The same weights and the same seed give the same answers, and those tie."""
    shutil.copytree(runs / "ppo", runs / "copy", dirs_exist_ok=True)
    flags = ["--against", str(runs / "copy"), "--judge", "tests.judges:longer"]
    policies, _, report = evaluate(*flags, names=("ppo",))
    assert list(policies) == ["base", "ppo", "copy"]
    assert policies["ppo"]["against"] == report["against"] == "copy"
    assert policies["ppo"]["metrics"]["win_rate"]["value"] == 0.5
    assert policies["base"]["metrics"]["win_rate"]["value"] != 0.5


def test_against_start_is_each_policy_against_what_it_started_from(evaluate):
    policies = evaluate("--against", "start", "--reward", "tests.judges:longer", names=("ppo",))[0]
    assert {name: p["against"] for name, p in policies.items()} == {"base": "base", "ppo": "sft", "sft": "base"}


def test_judges_agree_where_they_should(evaluate):
    """A pairwise judge by length, asked in both orders, is the score by length; None is left out, counted and said."""
    scored = evaluate("--judge", "tests.judges:longer", out="a")
    asked = evaluate("--judge", "tests.judges:first_if_longer", out="b")
    unread = 0
    for a, b in zip(scored[1], asked[1], strict=True):
        assert a["completion"] == b["completion"]
        if b["preference"] is None:
            unread += 1
        else:
            assert a["preference"] == b["preference"]
    judged = [p["judged"] for p in asked[0].values()]
    assert sum(j["comparisons"] - j["read"] for j in judged) == unread
    assert scored[0]["ppo"]["judged"] == {"comparisons": 12, "read": 12, "unreadable": []}


def test_a_temperature_is_the_one_that_kl_is_measured_at(evaluate):
    """Logits over T differ T times less, and their KL about T² times less."""
    usual, hot = (evaluate("--temperature", t, out=t, names=("sft",))[0]["sft"]["metrics"] for t in ("1", "10"))
    assert abs(hot["kl_to_base"]["value"]) < usual["kl_to_base"]["value"] / 10  # an estimate from few draws, ± more


def test_near_temperature_0_all_answers_to_a_prompt_are_the_same(evaluate):
    policies, rows, _ = evaluate("--temperature", "0.001", "--samples", "2", names=("sft",))
    assert all(a["completion"] == b["completion"] for a, b in zip(rows[::2], rows[1::2], strict=True))
    assert policies["base"]["metrics"]["self_bleu"]["value"] == 1.0


def test_the_first_answer_of_each_policy_can_be_shown(runs, tmp_path, capsys):
    """What the pipeline ends with."""
    names = (str(runs / "sft"),), str(runs / "prompts.jsonl")
    settings = PolicyEvaluation(
        *names, reward="tests.judges:longer", samples=2, max_new_tokens=4, out=str(tmp_path / "out")
    )
    compare_policies(settings, read_prompts(settings), show=2)
    text = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    second = next(row for row in rows if row["policy"] == "sft" and row["prompt"] == PROMPTS[1]["prompt"])
    assert f"{PROMPTS[1]['prompt']}\n  base  " in text
    assert f"   sft  {second['reward']:+.2f}  {second['completion']!r}\n" in text
    assert PROMPTS[2]["prompt"] not in text


def test_two_runs_of_one_name_are_told_apart(runs, tmp_path):
    shutil.copytree(runs / "sft", tmp_path / "sft")
    roster = read_roster([str(runs / "sft"), str(tmp_path / "sft"), str(runs / "sft") + "/"])
    assert [p.name for p in roster.policies.values()] == ["base", "sft", str(tmp_path / "sft")]


def test_a_prompt_that_comes_twice_is_asked_once(evaluate, runs, tmp_path):
    twice = tmp_path / "twice.jsonl"
    twice.write_text((runs / "prompts.jsonl").read_text() * 2)
    _, rows, report = evaluate("--prompts", str(twice), names=("sft",))
    assert report["prompts"] == 12
    assert [row["prompt"] for row in rows[:12]] == [row["prompt"] for row in PROMPTS]


def test_format_columns_and_bad_rows_of_prompts_are_those_of_a_recipe(evaluate, runs, tmp_path, capsys):
    """GSM8K's columns; the renamed one is the prompt, and verifiers find the others."""
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(3)] + [{"answer": "#### 5"}]
    file = tmp_path / "gsm8k.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", "policy", str(runs / "sft"), "--prompts", str(file), "--out", str(tmp_path / "refused")]
    assert main([*words, "--columns", "prompt=question"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {file}, row 4: there is no column 'question'")
    flags = ["--columns", "prompt=question", "--format", "prompt", "--on-bad-row", "skip", "--reward", "exact_number"]
    _, answers, report = evaluate("--prompts", str(file), *flags, names=("sft",))
    assert [row["prompt"] for row in answers if row["policy"] == "sft"] == ["0 + 1?", "1 + 1?", "2 + 1?"]
    assert {row["reward"] for row in answers} <= {0.0, 1.0}
    assert any(note.startswith("1 of 4 rows of prompts are left out: row 4: ") for note in report["notes"])
    assert (report["columns"], report["format"], report["on_bad_row"]) == ({"prompt": "question"}, "prompt", "skip")
    assert main([*words, "--columns", "prompt"]) == 2
    assert "--columns: 'prompt': write it OURS=THEIRS" in capsys.readouterr().err


def test_a_start_that_is_gone_is_noted_and_is_an_error_only_where_it_is_needed(runs, tmp_path):
    info = json.loads((runs / "ppo/run.json").read_text())
    info["recipe"]["policy_from"] = str(tmp_path / "gone")
    shutil.copytree(runs / "ppo", tmp_path / "moved")
    (tmp_path / "moved/run.json").write_text(json.dumps(info))
    roster = read_roster([str(tmp_path / "moved")])
    assert [p.reference for p in roster.policies.values()] == [BASE, None]
    assert roster.notes == [f"moved: {tmp_path}/gone, which it started from, is not there; no KL to that reference"]
    assert main(["evaluate", "policy", str(tmp_path / "moved"), "--prompts", "x.jsonl", "--against", "start"]) == 2


def test_a_server_that_always_says_a_changes_nothing(evaluate):
    """Both orders of each pair are asked, so a judge that only knows the first position gives every policy one half."""
    with serving() as server:
        policies, _, report = evaluate("--judge", server.url, names=("sft",))
    sft = policies["sft"]
    assert sft["metrics"]["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert sft["judged"] == {"comparisons": 12, "read": 12, "first_rate": 1.0, "unreadable": []}
    assert report["judge"] == f"first-model at {server.url}"
    assert "sft: 100% of the judge's preference went to what it was shown first; 50% is fair" in report["notes"]


def test_a_server_that_talks_nonsense_gives_no_win_rate_and_a_note(evaluate):
    with serving() as server:
        server.script = [("said", "Who knows?")]
        policies, rows, report = evaluate("--judge", server.url, names=("sft",))
    assert "win_rate" not in policies["sft"]["metrics"]
    assert policies["sft"]["judged"]["read"] == 0
    assert len(policies["sft"]["judged"]["unreadable"]) == 24
    assert {row["preference"] for row in rows if row["policy"] == "sft"} == {None}
    assert any(note.startswith("sft: 12 of 12 comparisons are left out") for note in report["notes"])


def test_long_prompts_and_empty_answers_are_counted_and_nothing_is_nan(evaluate, runs, tmp_path, monkeypatch, capsys):
    """The runs were trained with 48 prompt tokens, a byte each. A rollout that ends at once says nothing."""
    rows = [{"prompt": prompt, "chosen": "same", "rejected": "same"} for prompt in ("?" * 100, "Hi?", "Ho?")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def nothing(backbone, role, prompts, rollout, *, stop_ids, **limits):
        return [Sequence(prompt, stop_ids[:1]) for prompt in prompts]

    monkeypatch.setattr("lowrank_rlhf.evaluation.answers.generate", nothing)
    flags = ["--reward", "tests.judges:longer", "--judge", "tests.judges:first_if_longer", "--prompts"]
    policies, answers, report = evaluate(*flags, str(tmp_path / "prompts.jsonl"), names=("sft",))
    assert "1 of 3 prompts are cut to the runs' data.max_prompt_tokens, 48" in report["notes"]
    assert "sft: 3 of 3 answers say nothing" in report["notes"]
    assert {row["completion"] for row in answers} == {""}
    assert policies["sft"]["metrics"]["win_rate"]["value"] == 0.5
    assert "nan" not in capsys.readouterr().out.lower()


def test_a_judge_that_fails_leaves_the_answers(runs, tmp_path):
    words = ["--prompts", str(runs / "prompts.jsonl"), "--max-new-tokens", "4", "--out", str(tmp_path / "out")]
    with serving() as server:
        server.script = [("said", "[[A]]"), 401]
        assert main(["evaluate", "policy", str(runs / "sft"), *words, "--judge", server.url]) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["answers.jsonl"]
    assert len((tmp_path / "out/answers.jsonl").read_text().splitlines()) == 24


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--judge", "nonsense"], "--judge: 'nonsense': expected reward, module:function, a verifier (exact_match, "),
        (
            ["--judge", "localhost:8000/v1"],
            "--judge: 'localhost:8000/v1': expected reward, module:function, a verifier",
        ),
        (["--judge", "ftp://host/v1"], "--judge: 'ftp://host/v1': expected reward, module:function, a verifier"),
        (["--judge", "http://127.0.0.1:99999/v1"], "--judge: http://127.0.0.1:99999/v1/models cannot be used: "),
        (["--judge", "http://[::1/v1"], "--judge: http://[::1/v1/models is no address: "),
        (["--judge", "reward"], "--judge reward: there is no reward; give --reward-from or --reward"),
        (["--judge", "tests.judges:absent"], "--judge: 'tests.judges:absent' cannot be imported"),
        (["--judge", "tests.judges:neither"], "--judge: tests.judges:neither must take (prompts, completions"),
        (["--judge", "http://127.0.0.1:9/v1"], "--judge: http://127.0.0.1:9/v1/models cannot be used: "),
        (["--gold", "absent"], "--gold: 'absent': expected module:function, the URL of a reward server"),
        (["--gold", "http://127.0.0.1:9/score"], "--gold: http://127.0.0.1:9/score cannot be reached: "),
        (["--reward", "tests.absent:f"], "--reward: 'tests.absent:f' cannot be imported"),
        (["--reward-from", "absent"], "--reward-from: absent is not a run directory"),
        (["--against", "absent"], "--against: absent is not a run directory"),
        (["--samples", "0"], "--samples: must be at least 1, got 0"),
        (["--temperature", "0"], "--temperature: must be above 0, got 0.0"),
        (["--max-new-tokens", "0"], "--max-new-tokens: must be at least 1, got 0"),
        (["--out", "recipes"], "--out: recipes is not an empty folder; choose another"),
    ],
)
def test_what_cannot_be_used_is_told_before_anybody_answers(flags, words, runs, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(policy, "sample_answers", None)
    out = [] if "--out" in flags else ["--out", str(tmp_path / "out")]
    command = ["evaluate", "policy", str(runs / "sft"), "--prompts", str(runs / "prompts.jsonl"), *out]
    assert main([*command, *flags]) == 2
    assert f"error: {words}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("run", "prompts", "words"),
    [
        ("absent", None, "error: RUN: absent is not a run directory"),
        ("reward", None, "reward/adapters has no policy or sft, so this run cannot answer"),
        ("sft", "", "prompts.jsonl: the file has no rows"),
        ("sft", '{"question": "Hi?"}\n', "prompts.jsonl, row 1: columns"),
        ("sft", '{"prompt": "Hi?"}\n{"prompt": ""}\n', "prompts.jsonl, row 2: column 'prompt' is empty"),
    ],
)
def test_runs_and_prompts_that_are_none(run, prompts, words, runs, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text((runs / "prompts.jsonl").read_text() if prompts is None else prompts)
    name = run if run == "absent" else str(runs / run)
    assert main(["evaluate", "policy", name, "--prompts", str(file), "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


def test_a_function_whose_columns_are_missing_is_told_with_what_there_is(runs, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(policy, "sample_answers", None)
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hi?", "level": 1}\n')
    command = ["evaluate", "policy", str(runs / "sft"), "--prompts", str(tmp_path / "p.jsonl")]
    for flag, function in (
        ("--gold", "recipes.quickstart.gold:gold"),
        ("--judge", "tests.judges:needs_an_answer"),
        ("--judge", "pattern"),
    ):
        assert main([*command, flag, function]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {flag}: {function}: missing a required")
        assert error.endswith("; columns of the prompts: level\n")


def test_a_judge_that_returns_no_preference_is_told(runs, capsys, tmp_path):
    flags = ["--prompts", str(runs / "prompts.jsonl"), "--max-new-tokens", "2", "--out", str(tmp_path / "o")]
    assert main(["evaluate", "policy", str(runs / "sft"), *flags, "--judge", "tests.judges:too_sure"]) == 2
    assert "--judge: tests.judges:too_sure returned 1.5: not a preference from 0 to 1" in capsys.readouterr().err


def test_a_run_of_another_base_is_refused(runs, capsys, tmp_path):
    shutil.copytree(runs / "sft", tmp_path / "other")
    info = json.loads((tmp_path / "other/run.json").read_text())
    info["base"]["revision"] = "seed-1"
    (tmp_path / "other/run.json").write_text(json.dumps(info))
    names = [str(runs / "sft"), str(tmp_path / "other")]
    assert main(["evaluate", "policy", *names, "--prompts", str(runs / "prompts.jsonl")]) == 2
    assert "another revision of the base" in capsys.readouterr().err
