"""A SkyPilot task calls the command line with the very values that were given, holds no secret, and fits its schema."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lowrank_rlhf import cli
from lowrank_rlhf.config_pipeline import RECIPES, PipelineRecipe
from lowrank_rlhf.loader import as_dict, load_recipe
from lowrank_rlhf.remote.skypilot import THERE

ROOT = Path(__file__).resolve().parents[1]
SKYPILOT = "skypilot==0.14.1"
NASTY = [
    "two  words", "it's", 'a "quoted" word', "$(touch ran)", "`touch ran`", "$HOME ${PATH}", "a; touch ran", "a\nb\n",
    "RECIPE", "\nRECIPE\ntouch ran\nRECIPE\n", "\nRECIPE\nRECIPE_\n", "-x", "--resume", "*", "~", "a\\nb\\", "a\tb",
    "σ → 中文 🙂", "a\u2028b", "bell\a", "# no comment", "key: value", "{{ jinja }}", "&& touch ran ||", "> ran",
    "\r\n", " ",
]  # fmt: skip
# Says what it was called with, and what the files that it was given hold
FAKE = f"""#!{sys.executable}
import json, os, pathlib, sys
files = {{str(path): path.read_text(errors="replace") for path in pathlib.Path().rglob("*") if path.is_file()}}
print(json.dumps({{"argv": sys.argv, "files": files, "stdin": sys.stdin.read(), "path": os.environ["PYTHONPATH"]}}))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a recipe and its data, and no secret in the environment."""
    folder = tmp_path / "here"
    (folder / "data").mkdir(parents=True)
    (folder / "data/d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "sft_mine.yaml").write_text("data:\n  train: data/d.jsonl\ntrain:\n  max_steps: 5\n")
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    return folder


def export(*words, recipe="sft_mine.yaml"):
    """The task file's text and its content."""
    assert cli.main(["remote", "export", "--to", "skypilot", recipe, "--out", "task.yaml", *words]) == 0
    text = Path("task.yaml").read_text(encoding="utf-8")
    assert not Path(".task.yaml.tmp").exists()
    return text, yaml.safe_load(text)


def run(task, home):
    """What the fake command line says when the task's `run` goes through bash on a machine with that home directory."""
    fakes = home / "fakes"
    fakes.mkdir(parents=True, exist_ok=True)
    for name in ("lowrank-rlhf", "python"):
        (fakes / name).write_text(FAKE)
        (fakes / name).chmod(0o755)
    for mount, source in task.get("file_mounts", {}).items():  # as SkyPilot does it
        target = home / mount.removeprefix("~/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    workdir = home / "sky_workdir"
    workdir.mkdir(exist_ok=True)
    env = {"HOME": str(home), "PATH": f"{fakes}:/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        ["bash", "-c", task["run"]], cwd=workdir, env=env, capture_output=True, text=True, input="typed"
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert not list(home.rglob("ran"))
    return json.loads(done.stdout)


def resolved(said, tmp_path):
    """The recipe that was given there, read as the command line does."""
    file = tmp_path / "given.yaml"
    file.write_text(said["files"][said["argv"][3]], encoding="utf-8")
    return as_dict(load_recipe(RECIPES["sft"], file))


def test_the_task_says_what_to_rent_to_install_and_to_run(here, tmp_path):
    text, task = export()
    assert list(task) == ["name", "resources", "workdir", "file_mounts", "setup", "run"]
    assert (task["name"], task["resources"]) == ("sft-mine", {"accelerators": "L4:1"})
    assert task["workdir"] == str(ROOT)
    assert "-c constraints.txt -e ." in task["setup"]
    assert task["setup"].endswith("doctor\n")
    said = run(task, tmp_path / "home")
    assert said["argv"][1:] == ["sft", "--config", "tasks/sft-mine/recipe.yaml"]
    assert said["path"] == str(tmp_path / "home" / THERE / "work")
    assert said["files"]["data/d.jsonl"] == (here / "data/d.jsonl").read_text()
    ours = {**as_dict(load_recipe(RECIPES["sft"], "sft_mine.yaml")), "run_dir": "runs/sft-mine"}
    assert resolved(said, tmp_path) == ours
    head = [line for line in text.splitlines() if line.startswith("#   ")]
    assert head == [
        "#   sky launch -c sft-mine -i 30 task.yaml",
        f"#   rsync -Pavz --exclude checkpoints sft-mine:{THERE}/work/runs/sft-mine runs/",
        "#   sky down sft-mine",
    ]


def test_without_out_the_task_is_printed(here, capsys):
    _, task = export()
    capsys.readouterr()
    assert cli.main(["remote", "export", "--to", "skypilot", "sft_mine.yaml"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == task


@pytest.mark.parametrize("value", NASTY, ids=ascii)
def test_any_value_arrives_as_it_is_and_runs_nothing(here, tmp_path, value):
    run_dir = json.dumps(f"runs/{value}", ensure_ascii=False)
    text, task = export(f"base.model={json.dumps(value, ensure_ascii=False)}", f"run_dir={run_dir}")
    assert all(line.startswith("#") for line in text[: text.index("\nname: ")].splitlines())
    given = resolved(run(task, tmp_path / "home"), tmp_path)
    assert given["base"]["model"] == value
    assert given["run_dir"] == f"runs/{value}"


@pytest.mark.parametrize(
    "name", ["two  words.jsonl", 'a "b".jsonl', "`touch ran`; touch ran.jsonl", "-x &.jsonl", "σ 🙂.jsonl"]
)
def test_a_file_of_any_name_that_skypilot_can_send_arrives(here, tmp_path, name):
    (here / name).write_text('{"prompt": "other", "completion": "b"}\n')
    _, task = export(f"data.train={json.dumps(f'./{name}', ensure_ascii=False)}")
    said = run(task, tmp_path / "home")
    assert said["files"][resolved(said, tmp_path)["data"]["train"]] == (here / name).read_text()


@pytest.mark.parametrize("name", ["it's.jsonl", "$HF_TOKEN.jsonl", "a\nb.jsonl", "a\\b.jsonl"], ids=ascii)
def test_a_file_that_skypilot_would_break_on_is_refused(here, capsys, name):
    """Its command says `rsync 'PATH'` with Python's own quotes, which become double ones around an apostrophe."""
    (here / name).write_text("{}\n")
    words = ["remote", "export", "--to", "skypilot", "sft_mine.yaml", f"data.train={json.dumps(name)}"]
    assert cli.main(words) == 2
    assert "rename it" in capsys.readouterr().err


def test_a_linked_file_is_sent_with_its_content(here, tmp_path):
    (here / "data/link.jsonl").symlink_to(here / "data/d.jsonl")
    _, task = export("data.train=data/link.jsonl")
    assert list(task["file_mounts"].values()) == [str(here / "data/d.jsonl")]
    assert "data/link.jsonl" in run(task, tmp_path / "home")["files"]


def test_a_run_that_is_here_goes_along_and_one_that_is_not_is_named(here, tmp_path):
    (here / "runs/sft-1/adapters/sft").mkdir(parents=True)
    (here / "runs/sft-1/run.json").write_text("{}")
    (here / "runs/sft-1/adapters/sft/adapter_model.safetensors").write_text("weights")
    (here / "ppo.yaml").write_text("policy_from: runs/sft-1\nreward_from:\n- run: runs/reward-7\nkl:\n  coef: 0.1\n")
    (here / "data/p.jsonl").write_text('{"prompt": "a"}\n')
    text, task = export("data.train=data/p.jsonl", recipe="ppo.yaml")
    assert "# reward_from.0.run: runs/reward-7 is not here" in text
    said = run(task, tmp_path / "home")
    given = yaml.safe_load(said["files"][said["argv"][3]])
    assert said["files"][f"{given['policy_from']}/adapters/sft/adapter_model.safetensors"] == "weights"
    assert given["reward_from"][0]["run"] == "runs/reward-7"


def test_launched_again_it_goes_on_with_its_run(here, tmp_path):
    _, task = export()
    home = tmp_path / "home"
    assert "--resume" not in run(task, home)["argv"]
    there = home / THERE / "work/runs/sft-mine"
    there.mkdir(parents=True)
    (there / "run.json").write_text("{}")
    assert run(task, home)["argv"][-1] == "--resume"


def test_two_cards_have_a_process_each(here, tmp_path):
    _, task = export("--gpu", "A100-80GB:2")
    assert task["resources"] == {"accelerators": "A100-80GB:2"}
    said = run(task, tmp_path / "home")
    words = ["-m", "lowrank_rlhf.launch", "--processes", "2", "sft", "--config", "tasks/sft-mine/recipe.yaml"]
    assert said["argv"][1:] == words
    assert said["stdin"] == ""  # no secrets come that way here


def test_rollouts_and_pipelines_have_one_card(here, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for stage in ("ppo", "grpo", "pipeline"):
        assert cli.main(["remote", "export", "--to", "skypilot", f"recipes/{stage}.yaml", "--gpu", "L4:2"]) == 2
        assert f"{stage} runs on one card: give L4:1" in capsys.readouterr().err


@pytest.mark.parametrize("gpu", ["", "L4:", "L4:0", "L4:0.5", ":2", "L4: 2", "L4\nrun: x"], ids=ascii)
def test_a_card_that_cannot_be_meant_is_refused(here, capsys, gpu):
    assert cli.main(["remote", "export", "--to", "skypilot", f"--gpu={gpu}", "sft_mine.yaml"]) == 2
    assert "--gpu" in capsys.readouterr().err


def test_secrets_are_names_alone(here, monkeypatch, capsys):
    for name in ("HF_TOKEN", "MY_KEY"):
        monkeypatch.setenv(name, f"value-of-{name}")
    text, task = export("--secret", "MY_KEY", "--secret", "NOT_SET_YET")
    assert task["secrets"] == {"HF_TOKEN": None, "MY_KEY": None, "NOT_SET_YET": None}
    assert "--secret HF_TOKEN --secret MY_KEY --secret NOT_SET_YET" in text
    assert "value-of" not in text
    capsys.readouterr()
    assert cli.main(["remote", "export", "--to", "skypilot", "sft_mine.yaml", "--secret", "MY_KEY=oops"]) == 2
    said = capsys.readouterr().err
    assert "--secret" in said
    assert "oops" not in said


def test_a_pipeline_has_its_stages_with_it(here, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "task.yaml"
    assert cli.main(["remote", "export", "--to", "skypilot", "recipes/pipeline.yaml", "--out", str(out)]) == 0
    task = yaml.safe_load(out.read_text(encoding="utf-8"))
    said = run(task, tmp_path / "home")
    assert said["argv"][1:] == ["pipeline", "--config", "tasks/pipeline/recipe.yaml"]
    monkeypatch.chdir(tmp_path / "home" / THERE / "work")
    given = load_recipe(PipelineRecipe, "tasks/pipeline/recipe.yaml")
    assert sorted(given.stages) == ["dpo", "ppo", "reward", "sft"]
    assert all(Path(file).is_file() for file in [*given.stages.values(), given.comparison.prompts])


@pytest.fixture(scope="module")
def sky(tmp_path_factory):
    """A Python with SkyPilot, in an environment of its own."""
    folder = tmp_path_factory.mktemp("skypilot")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    for command in (
        [python, "-m", "pip", "install", "-q", "uv"],  # pip alone takes minutes for its two hundred packages
        [folder / "venv/bin/uv", "pip", "install", "-q", "--python", python, SKYPILOT],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            pytest.skip(f"{SKYPILOT} could not be installed from the package index: {done.stderr[-500:]}")
    return python


def accepted(sky, file, home):
    """Whether SkyPilot reads the task, and what it says."""
    program = "import json, sky, sys; task = sky.Task.from_yaml(sys.argv[1]); task.validate_name(); "
    # Not `validate()`, which also looks for the credentials of a cloud
    program += "task.expand_and_validate_workdir(); task.expand_and_validate_file_mounts(); "
    program += "print(json.dumps(task.to_yaml_config()))"
    env = {"HOME": str(home), "PATH": os.environ["PATH"], "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    done = subprocess.run([sky, "-c", program, file], env=env, capture_output=True, text=True, timeout=300)
    return done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_skypilot_reads_the_task(here, sky, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "x")
    (here / "two  words.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    _, task = export("--gpu", "A100:2", "data.train='two  words.jsonl'", f"base.model={json.dumps(NASTY[9])}")
    fits, said = accepted(sky, "task.yaml", tmp_path)
    assert fits, said
    read = json.loads(said[said.index("{") :])
    assert read["run"] == task["run"]
    assert read["setup"] == task["setup"]
    assert read["resources"]["accelerators"] == {"A100": 2}
    assert list(read["file_mounts"].values()) == [str(here / "two  words.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [("sekrets", {}), ("setup", ["a"]), ("resources", {"gpus_": 1}), ("file_mounts", {"~/x": "/nowhere/at/all"})],
)
def test_what_skypilot_would_refuse_is_told_by_that(here, sky, tmp_path, key, value):
    """The check above can fail: a task that is wrong at one key is not read."""
    _, task = export()
    Path("wrong.yaml").write_text(yaml.safe_dump({**task, key: value}))
    fits, said = accepted(sky, "wrong.yaml", tmp_path)
    assert not fits
    assert key in said or "nowhere" in said
