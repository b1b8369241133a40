"""The recipes in folders, for cards of 8 to 24 GB: each runs as it is in its tiny form, on rows like its data set's."""

import json
import re
from pathlib import Path

import pytest
import torch

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.cli import STAGES
from lowrank_rlhf.cli import main as cli_main
from lowrank_rlhf.config import Base, Lora
from lowrank_rlhf.config_pipeline import PipelineRecipe
from lowrank_rlhf.loader import load_recipe

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "recipes/README.md"
FILES = sorted((ROOT / "recipes").glob("*_*/*.yaml"))
RECIPES = [path for path in FILES if path.stem != "pipeline"]
PIPELINES = [path for path in FILES if path.stem == "pipeline"]

GIB = 2**30
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes per weight: 4 bits, 8 for each 64 weights, 32 for each 256 of those
ALLOWANCE = 1.5


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def card(path: Path) -> int:
    """The gigabytes that a recipe's header says it is for."""
    found = re.match(r"# not measured; for a card of (\d+) GB: ", path.read_text(encoding="utf-8").splitlines()[1])
    assert found, path
    return int(found[1])


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# What stands in for the hub: rows in the columns that each data set has there


def hh(i: int) -> dict[str, object]:
    asked = (
        f"\n\nHuman: What is {i} plus 1?\n\nAssistant: Do you mean the sum?\n\nHuman: Yes, number {i}.\n\nAssistant:"
    )
    return {"chosen": f"{asked} It is {i + 1}.", "rejected": f"{asked} No idea."}


def gsm8k(i: int) -> dict[str, object]:
    return {
        "question": f"Ann has {i} apples and buys 2. How many?",
        "answer": f"{i} + 2 = <<{i}+2={i + 2}>>\n#### {i + 2}",
    }


def post(i: int) -> str:
    return f"SUBREDDIT: r/advice\n\nTITLE: Cat {i}\n\nPOST: My cat number {i} left.\n\nTL;DR:"


def tldr(i: int) -> dict[str, object]:
    return {"prompt": post(i), "completion": f" Cat {i} left."}


def tldr_preference(i: int) -> dict[str, object]:
    return {"prompt": post(i), "chosen": f" Cat {i} left.", "rejected": " A cat."}


def ultrafeedback(i: int) -> dict[str, object]:
    asked = turn("user", f"Name {i} colours.")
    answers = {"chosen": f"Red, {i} times.", "rejected": "I will not."}
    return {
        **{column: [asked, turn("assistant", text)] for column, text in answers.items()},
        **{"score_chosen": 8.5, "score_rejected": 3.0},
    }


def ultrachat(i: int) -> dict[str, object]:
    turns = [turn("user", f"Hello {i}."), turn("assistant", "Hello."), turn("user", "Bye."), turn("assistant", "Bye.")]
    return {"prompt": f"Hello {i}.", "prompt_id": f"{i:064x}", "messages": turns}


# name: its configurations, its folders, its splits and a row
HUB = {
    "Anthropic/hh-rlhf": ([], ["helpful-base", "harmless-base"], ["train", "test"], hh),
    "openai/gsm8k": (["main", "socratic"], [], ["train", "test"], gsm8k),
    "trl-lib/tldr": ([], [], ["train", "validation", "test"], tldr),
    "trl-lib/tldr-preference": ([], [], ["train", "validation"], tldr_preference),
    "trl-lib/ultrafeedback_binarized": ([], [], ["train", "test"], ultrafeedback),
    "HuggingFaceH4/ultrachat_200k": ([], [], ["train_sft", "test_sft", "train_gen", "test_gen"], ultrachat),
}


def load_dataset(name, config=None, *, data_dir=None, split):
    """What `datasets.load_dataset` answers for these names, without a network."""
    configs, folders, splits, row = HUB[name]
    if config not in (configs or [None]):
        raise ValueError(f"BuilderConfig {config!r} not found. Available: {configs or ['default']}")
    assert data_dir is None or data_dir in folders
    assert split.partition("[")[0] in splits
    first = 100 * splits.index(split.partition("[")[0])
    return [row(i) for i in range(first, first + 40)]


@pytest.fixture(autouse=True)
def _hub(monkeypatch):
    import datasets

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run of a recipe in its tiny form, with those it goes on from, or the folder of a pipeline; each made once."""
    runs: dict[Path, Path] = {}

    def run(path: Path) -> Path:
        pipeline = path.with_stem("pipeline")
        if pipeline in PIPELINES and path != pipeline:
            return run(pipeline) / path.stem
        if path not in runs:
            folder = tmp_path_factory.mktemp("runs") / path.stem
            words = [path.stem, "--config", str(path.relative_to(ROOT)), "--tiny"]
            if path == pipeline:
                words += ["--run-dir", str(folder)]
            else:
                links = {key: run(found) for key, found in goes_on_from(path).items()}
                keys = {"policy_from": "policy_from={}", "reward_from": "reward_from=[{{run: {}}}]"}
                words += [f"run_dir={folder}", *(keys[key].format(link) for key, link in links.items())]
            assert cli_main(words) == 0
            runs[path] = folder
        return runs[path]

    return run


def goes_on_from(path: Path) -> dict[str, Path]:
    """The recipes, of the same folder, whose runs another one names, by the key that does."""
    recipe = load_recipe(STAGES[path.stem][1], path)
    sources = getattr(recipe, "reward_from", [])
    named = {"policy_from": getattr(recipe, "policy_from", None), "reward_from": sources[0].run if sources else None}
    return {key: path.with_stem(Path(run).name) for key, run in named.items() if run is not None}


def test_there_are_recipes_for_every_method_and_size_of_card():
    assert {path.stem for path in RECIPES} == set(STAGES)
    assert {card(path) for path in FILES} == {8, 12, 16, 24}
    assert len(PIPELINES) == 2


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_is_printed_without_reading_data(path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.load_dataset", None)
    assert cli_main([path.stem, "--config", str(path), "--dry-run"]) == 0
    assert f"run_dir: runs/{path.parent.name}/{path.stem}\n" in capsys.readouterr().out


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_what_a_recipe_goes_on_from_is_the_run_of_another_on_the_same_base(path):
    recipe = load_recipe(STAGES[path.stem][1], path)
    for key, found in goes_on_from(path).items():
        other = load_recipe(STAGES[found.stem][1], found)
        assert other.run_dir in (recipe.policy_from, *(source.run for source in getattr(recipe, "reward_from", [])))
        assert (other.base, other.data.prompt_template) == (recipe.base, recipe.data.prompt_template), key


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_runs_two_real_steps_in_its_tiny_form(path, finished):
    run = finished(path)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    info = json.loads((run / "run.json").read_text())
    assert (rows[0]["step"], rows[-1]["step"]) == (0, 2)
    assert info["base"]["model"] == "tiny"
    source = info["data_report"]["sources"][0]
    assert source["source"] == load_recipe(STAGES[path.stem][1], path).data.train
    assert (source["rows"], source["skipped"]) == (12, 0)


@pytest.mark.parametrize("path", PIPELINES, ids=name)
def test_a_pipeline_runs_in_its_tiny_form(path, finished):
    page = (finished(path) / "report.md").read_text()
    for stage in load_recipe(PipelineRecipe, path).stages:
        assert f"| {stage} | " in page


# The page's estimates


def table(heading: str) -> list[list[str]]:
    """The cells of the rows of the page's table whose header line begins so."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |")) + 2
    rows = (line for line in lines[first : lines.index("", first)])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def saved(hidden: int, queries: int, keys: int, inner: int, r: int) -> int:
    """Bytes that a layer keeps of each token for backward."""
    return 28 * hidden + 8 * queries + 4 * keys + 10 * inner + 28 * r


def estimate(path: Path) -> list[str]:
    """Card, tokens in a forward, and GiB of base, adapters, activations, rollout and all, by the page's formula."""
    recipe = load_recipe(STAGES[path.stem][1], path)
    cells = next(row for row in table("base") if row[0] == recipe.base.model)
    layers, hidden, queries, keys, inner, words, tables = (int(cell.replace(",", "")) for cell in cells[1:])
    data, train, r = recipe.data, recipe.train, recipe.lora.r
    longest = data.max_prompt_tokens + data.max_completion_tokens
    rows = train.micro_batch_size * (2 if path.stem in ("reward", "dpo", "orpo") else 1)
    tokens = min(rows * longest, getattr(train, "micro_batch_tokens", None) or rows * longest)
    trained = 2 if path.stem == "ppo" else 1
    frozen = len(getattr(recipe, "reward_from", [])) + (getattr(recipe, "policy_from", None) is not None)
    base = layers * hidden * (2 * queries + 2 * keys + 3 * inner) * NF4 + 2 * tables * words * hidden
    adapters = r * layers * (7 * hidden + 2 * queries + 2 * keys + 3 * inner) * (16 * trained + 4 * frozen)
    activations = tokens * (2 * layers * hidden + saved(hidden, queries, keys, inner, r) + 12 * inner)
    answers = recipe.rollout.batch_size if hasattr(recipe, "rollout") else 0
    rollout = answers * (4 * layers * keys * longest + 10 * words)
    assert train.gradient_checkpointing
    parts = [base / GIB, adapters / GIB, activations / GIB, rollout / GIB]
    whole = base + adapters + max(activations, rollout)
    return [str(card(path)), f"{tokens:,}", *(f"{part:.1f}" for part in parts), f"{whole / GIB + ALLOWANCE:.1f}"]


def test_the_page_says_what_its_formula_gives():
    assert {row[0]: row[1:] for row in table("recipe")} == {name(path): estimate(path) for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_quarter_of_the_card_is_left(path):
    assert float(estimate(path)[-1]) <= 0.75 * card(path)


def test_a_layer_keeps_what_the_formula_says():
    """Counted on the tiny base in bf16. The norm before the first layer keeps nothing, as the embedding does not learn;
    the one behind the last keeps as much."""
    backbone = Backbone(Base(model="tiny", quantization="none", device="cpu"), dtype=torch.bfloat16)
    backbone.add_role("policy", Lora(r=4))
    backbone.train_only("policy")
    known = {p.untyped_storage().data_ptr() for p in [*backbone.model.parameters(), *backbone.model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(2, 64, dtype=torch.long)
    with backbone.use("policy", train=True) as model, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.base_model(input_ids=ids, use_cache=False)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / ids.numel()
    config = model.config
    heads = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim)
    layer = saved(config.hidden_size, *heads, config.intermediate_size, r=4)
    assert found == pytest.approx(config.num_hidden_layers * layer, rel=0.02)
