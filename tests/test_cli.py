"""The command line: --help answers at once without torch, bad input is one line and status 2, --dry-run tells all."""

import os
import resource
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lowrank_rlhf import __version__, cli
from lowrank_rlhf.cli import STAGES, run_safely
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.loader import load_recipe

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-c", "import sys; from lowrank_rlhf.cli import main; sys.exit(main())"]
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate", "numpy")


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(*arguments, command=COMMAND, cwd=ROOT):
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, cwd=cwd)


def verbs():
    """The verbs that --help lists."""
    lines = run("--help").stdout.partition("VERB\n")[2].splitlines()
    return [line.split()[0] for line in lines if line.startswith("    ") and not line.startswith("     ")]


# --help


def test_help_answers_in_less_than_0_3_seconds():
    """Of CPU time, which is what it takes where nothing else runs."""

    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    seconds = []
    for _ in range(5):
        before = spent()
        assert run("--help").returncode == 0
        seconds.append(spent() - before)
    assert 0 < min(seconds) < 0.3


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["sft", "--help"],
        ["evaluate", "reward", "--help"],
        ["evaluate", "policy", "--help"],
        ["ppo", "--unheard"],
        ["ppo", "--config", "recipes/ppo.yaml", "--dry-run"],
        ["ppo", "--config", "recipes/ppo.yaml", "unheard=1"],
    ],
)
def test_nothing_heavy_is_imported_before_a_stage_runs(arguments):
    code = f"import sys, atexit; atexit.register(lambda: print('heavy:', {set(HEAVY)} & set(sys.modules)))"
    done = run(*arguments, command=[*COMMAND[:2], f"{code}; {COMMAND[2]}"])
    assert "Traceback" not in done.stderr
    assert done.stdout.endswith("heavy: set()\n")


def test_every_verb_has_help_and_every_stage_the_same_flags(capsys):
    assert set(verbs()) >= {*STAGES, "doctor"}
    for verb in verbs():
        with pytest.raises(SystemExit, match="0"):
            cli.main([verb, "--help"])
        shown = capsys.readouterr().out
        assert f"usage: lowrank-rlhf {verb} [-h]" in shown
        flags = ("--config FILE", "--dry-run", "--tiny", "--resume", "[key.sub=value ...]")
        if verb not in ("pipeline", "bench", "plan"):  # which have some of them
            assert {flag in shown for flag in flags} == {verb in STAGES}
        assert ("--overwrite" in shown) == (verb in STAGES or verb == "export")


def test_the_installed_command_is_this_one():
    installed = Path(sys.executable).with_name("lowrank-rlhf")
    assert run("--version", command=[str(installed)]).stdout == f"lowrank-rlhf {__version__}\n"


def test_the_pipeline_script_has_help_from_anywhere(tmp_path):
    done = run("--help", command=[sys.executable, str(ROOT / "recipes/pipeline.py")], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "stage.key=value" in done.stdout


# Bad input


def test_bad_input_is_one_line_on_stderr_and_status_2(tmp_path):
    done = run("sft", "--config", "recipes/sft.yaml", f"run_dir={tmp_path}/run", "train.epoch=1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: recipes/sft.yaml: train.epoch: unknown key; did you mean train.epochs?\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sft", "--config", "missing.yaml"], "error: missing.yaml: the recipe cannot be read: "),
        (["ppo", "--config", "recipes/ppo.yaml", "lora.r"], "error: 'lora.r': an override is written key.sub=value"),
        (["reward", "--config", "recipes/reward.yaml", "lora.r=0"], "error: recipes/reward.yaml: lora.r: must be at"),
        (["sft", "--config", "recipes/ppo.yaml"], "error: recipes/ppo.yaml: reward: unknown key"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_told(arguments, words, capsys):
    assert cli.main([*arguments, "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(words)


@pytest.mark.parametrize("arguments", [[], ["unheard"], ["sft"], ["sft", "--config"], ["sft", "--config", "x", "--no"]])
def test_a_wrong_command_line_shows_its_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert capsys.readouterr().err.startswith("usage: lowrank-rlhf")


def test_only_bad_input_is_caught(capsys):
    """Everything else keeps its traceback."""

    def fail(error):
        raise error

    assert run_safely(lambda: 7) == 7
    assert run_safely(lambda: fail(UserError("a: b"))) == 2
    assert capsys.readouterr().err == "error: a: b\n"
    assert run_safely(lambda: fail(KeyboardInterrupt())) == 130
    for error in (RuntimeError("ours"), ValueError("ours")):
        with pytest.raises(type(error)):
            run_safely(lambda error=error: fail(error))


def test_flags_and_overrides_come_in_any_order(capsys):
    words = ["seed=2", "--dry-run", "lora.r=3", "--tiny", "train.max_steps=7"]
    assert cli.main(["sft", "--config", "recipes/sft.yaml", *words]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["seed"], printed["lora"]["r"], printed["train"]["max_steps"]) == (2, 3, 7)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["doctor", "seed=2"])


# --dry-run


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("flags", [[], ["--tiny"]], ids=["as it is", "tiny"])
def test_a_dry_run_prints_yaml_that_loads_as_the_same_recipe(stage, flags, capsys, tmp_path):
    overrides = ["train.learning_rate=3e-7", "lora.target_modules=[q_proj]", f"run_dir={tmp_path}/ü"]
    assert cli.main([stage, "--config", f"recipes/{stage}.yaml", "--dry-run", *flags, *overrides]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    recipe = load_recipe(STAGES[stage][1], f"recipes/{stage}.yaml", overrides, tiny=bool(flags))
    assert load_recipe(STAGES[stage][1], printed) == recipe
    assert list(yaml.safe_load(printed.read_text(encoding="utf-8")))[:4] == ["run_dir", "seed", "base", "lora"]
    assert os.listdir(tmp_path) == ["printed.yaml"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_recipe_script_has_help_and_resolves_the_same_recipe_as_the_verb(stage, monkeypatch, capsys):
    """In this process, where torch is imported already; a subprocess each would take five seconds."""

    def script(*arguments):
        monkeypatch.setattr(sys, "argv", [f"recipes/{stage}.py", *arguments])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(f"recipes/{stage}.py", run_name="__main__")
        return capsys.readouterr().out

    assert f"the recipe recipes/{stage}.yaml on the embedded model" in " ".join(script("--help").split())
    assert cli.main([stage, "--config", f"recipes/{stage}.yaml", "--dry-run", "seed=3"]) == 0
    by_verb = capsys.readouterr().out
    assert script("--dry-run", "seed=3") == by_verb
    assert "seed: 3\n" in by_verb
