"""What a recipe needs elsewhere is found and sent, and the recipe that runs there says the same as the one here."""

import json
from pathlib import Path

import pytest

from lowrank_rlhf.config_pipeline import RECIPES, PipelineRecipe
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.loader import as_dict, load_recipe
from lowrank_rlhf.remote.shipment import read_shipment, stage_of

ROOT = Path(__file__).resolve().parents[1]
YAMLS = sorted(path for path in ROOT.glob("recipes/**/*.yaml"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with data, a run and a module of one's own."""
    folder = tmp_path / "here"
    for name in ("data", "runs/sft-1/adapters/sft", "runs/sft-1/checkpoints/step-000005", "my_rewards"):
        (folder / name).mkdir(parents=True)
    (folder / "data/pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (folder / "runs/sft-1/run.json").write_text('{"stage": "sft"}')
    (folder / "runs/sft-1/adapters/sft/adapter_model.safetensors").write_text("weights")
    (folder / "runs/sft-1/checkpoints/step-000005/state.pt").write_text("gigabytes")
    (folder / "my_rewards/__init__.py").write_text("")
    (folder / "my_rewards/polite.py").write_text("def polite(prompts, completions): return [0.0] * len(prompts)\n")
    (folder / "alone.py").write_text("def short(prompts, completions): return [0.0] * len(prompts)\n")
    (folder / "beside.py").write_text("")
    monkeypatch.chdir(folder)
    return folder


def recipe(folder, name, text):
    (folder / name).write_text(text)
    return name


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_can_be_sent_and_reads_there_as_it_does_here(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    name = str(path.relative_to(ROOT))
    shipment = read_shipment(name, [])
    texts = shipment.recipes("/there/jobs/x", "runs/x")
    for file, text in texts.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    if stage_of(name) == "pipeline":
        again = load_recipe(PipelineRecipe, tmp_path / "recipe.yaml")
        assert again.stages == {stage: f"/there/jobs/x/{stage}.yaml" for stage in shipment.stages}
        assert {f"{stage}.yaml" for stage in again.stages} == texts.keys() - {"recipe.yaml"}
        ours = load_recipe(PipelineRecipe, name)
        assert (again.comparison, again.run_dir) == (ours.comparison, "runs/x")
    else:
        again = as_dict(load_recipe(RECIPES[shipment.stage], tmp_path / "recipe.yaml"))
        assert again == {**as_dict(load_recipe(RECIPES[shipment.stage], name)), "run_dir": "runs/x"}
    for file, place in shipment.files.items():
        assert file == str(ROOT / place)
        assert Path(file).is_file()


def test_the_stages_of_a_pipeline_say_there_what_they_say_here(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    shipment = read_shipment("recipes/pipeline.yaml", ["sft.train.epochs=2"], everything=True)
    assert list(shipment.stages) == ["sft", "reward", "ppo", "dpo", "orpo", "grpo"]
    assert shipment.stages["sft"]["train"]["epochs"] == 2
    assert shipment.stages["ppo"]["policy_from"] == "runs/pipeline/sft"
    assert shipment.needs == []
    assert "recipes/quickstart/gold.py" in shipment.files.values()
    assert "recipes/quickstart/data/prompts_test.jsonl" in shipment.files.values()


def test_data_of_the_working_directory_keeps_its_place_and_that_of_elsewhere_gets_one(here, tmp_path):
    (tmp_path / "other place").mkdir()
    other = tmp_path / "other place" / "eval.jsonl"
    other.write_text("{}\n")
    name = recipe(here, "reward.yaml", f"data:\n  train: data/pairs.jsonl\n  eval: {json.dumps(str(other))}\n")
    shipment = read_shipment(name, [])
    assert shipment.values["data"]["train"] == "data/pairs.jsonl"
    assert shipment.values["data"]["eval"] == f"inputs{other}"
    assert shipment.files == {str(here / "data/pairs.jsonl"): "data/pairs.jsonl", str(other): f"inputs{other}"}


def test_a_run_is_sent_without_checkpoints_and_never_over_one_there(here):
    name = recipe(here, "dpo.yaml", "data:\n  train: data/pairs.jsonl\npolicy_from: runs/sft-1\n")
    shipment = read_shipment(name, [])
    assert shipment.values["policy_from"] == f"inputs{here}/runs/sft-1"
    assert sorted(Path(file).name for file in shipment.files) == [
        "adapter_model.safetensors",
        "pairs.jsonl",
        "run.json",
    ]
    assert shipment.needs == []


def test_data_in_a_run_is_never_put_over_a_run_there(here):
    (here / "runs/sft-1/samples.jsonl").write_text("{}\n")
    name = recipe(here, "sft.yaml", "data:\n  train: runs/sft-1/samples.jsonl\n")
    assert read_shipment(name, []).values["data"]["train"] == f"inputs{here}/runs/sft-1/samples.jsonl"


def test_a_run_that_is_not_here_has_to_be_there(here):
    text = "data:\n  train: data/pairs.jsonl\npolicy_from: runs/sft-9\nreward_from: [{run: runs/reward-1}]\n"
    shipment = read_shipment(recipe(here, "ppo.yaml", text), [])
    assert shipment.needs == [("policy_from", "runs/sft-9"), ("reward_from.0.run", "runs/reward-1")]
    with pytest.raises(UserError, match=r"policy_from: /tmp/x is neither a run here nor below"):
        read_shipment("ppo.yaml", ["policy_from=/tmp/x"])


def test_modules_of_the_working_directory_come_along(here):
    text = "data:\n  train: data/pairs.jsonl\nreward: my_rewards.polite:polite\n"
    shipment = read_shipment(recipe(here, "grpo.yaml", text), [])
    assert {place for place in shipment.files.values() if place.endswith(".py")} == {
        "my_rewards/__init__.py",
        "my_rewards/polite.py",
    }
    shipment = read_shipment("grpo.yaml", ["reward=alone:short"])
    assert {place for place in shipment.files.values() if place.endswith(".py")} == {"alone.py", "beside.py"}
    shipment = read_shipment("grpo.yaml", ["reward=exact_number"])
    assert list(shipment.files.values()) == ["data/pairs.jsonl"]


def test_a_base_in_a_folder_is_sent_and_one_of_the_hub_is_not(here):
    (here / "model").mkdir()
    (here / "model/config.json").write_text("{}")
    name = recipe(here, "reward.yaml", "data:\n  train: data/pairs.jsonl\n")
    shipment = read_shipment(name, ["base.model=./model"])
    assert shipment.values["base"]["model"] == "model"
    assert "model/config.json" in shipment.files.values()
    assert list(read_shipment(name, ["base.model=org/model"]).files.values()) == ["data/pairs.jsonl"]
    assert read_shipment(name, ["data.train=org/data:train"]).files == {}


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("reward.yaml", ["data.train=gone.jsonl"], r"data\.train: there is no file gone\.jsonl here"),
        ("reward.yaml", ["run_dir=/abs"], "run_dir: /abs is to lie below the working directory"),
        ("reward.yaml", ["run_dir=../up"], "run_dir: .* is to lie below the working directory"),
        ("reward.yaml", ["train.epoch=1"], "train.epoch: unknown key; did you mean train.epochs"),
        ("mine.yaml", [], "is to begin with its stage"),
        ("train.py", [], "give the recipe, a YAML file such as"),
    ],
)
def test_what_cannot_run_there_is_told_here(here, name, words, said):
    recipe(here, name, "data:\n  train: data/pairs.jsonl\n")
    with pytest.raises(UserError, match=said):
        read_shipment(name, words)


def test_the_recipe_of_a_run_says_its_stage_by_the_run(here):
    assert stage_of(recipe(here, "runs/sft-1/recipe.yaml", "")) == "sft"


def test_more_stages_are_a_pipelines(here):
    with pytest.raises(UserError, match="--all: only a pipeline"):
        read_shipment(recipe(here, "reward.yaml", "data:\n  train: data/pairs.jsonl\n"), [], everything=True)
