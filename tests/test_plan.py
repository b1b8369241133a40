"""What `plan` says is what the real code takes."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowrank_rlhf.backbone import Backbone, shapes
from lowrank_rlhf.backbone.blueprint import with_layers
from lowrank_rlhf.cli import main
from lowrank_rlhf.config import Base, Data, Lora, PPORecipe, RewardModel, RewardRecipe, Rollout, SFTRecipe
from lowrank_rlhf.config_pipeline import RECIPES
from lowrank_rlhf.config_preference import KTORecipe
from lowrank_rlhf.loader import load_recipe
from lowrank_rlhf.plan.beside import as_long_as_its_rows, compare_memory
from lowrank_rlhf.plan.demand import Demand, Pass, demand
from lowrank_rlhf.plan.fit import make_fit
from lowrank_rlhf.plan.ledger import Ledger
from lowrank_rlhf.plan.predict import GIB, Plan, predict
from lowrank_rlhf.plan.rehearsal import BASE, OPTIMIZER, ROLES, UNPACKED, Rehearsal
from lowrank_rlhf.remote.shipment import stage_of

ROOT = Path(__file__).parent.parent
SMALL = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 9000}
KINDS = {"llama": "llama-3.1-8b", "qwen2": "qwen2.5-0.5b", "smollm3": "smollm3-3b"}
LORA = Lora(r=4)


@pytest.fixture
def small(monkeypatch):
    """`random/KIND` is a base of three layers and two and a bit chunks of words."""
    for kind, shape in KINDS.items():
        monkeypatch.setitem(shapes.SHAPES, kind, {**shapes.SHAPES[shape], **SMALL})


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Every connection is refused, and the hub's library knows that it is."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def demanded(kind, reads="logps", **more):
    head = reads != "logps"
    return Demand(["policy"], {"policy": head}, [Pass("it", kind, "policy", 3, 20, 12, reads=reads, **more)])


def bare(kind, wanted, *, quantize=True, layers=None, checkpointing=False, lora=LORA):
    config = shapes.shape_config(kind)
    config = config if layers is None else with_layers(config, layers)
    made = Rehearsal.without_content(config, wanted, lora, Rollout(), dtype=torch.float32, quantize=quantize)
    if checkpointing:
        made.backbone.enable_gradient_checkpointing()
    return made


def real(kind, wanted, *, quantize=True, checkpointing=False):
    ledger = Ledger()
    with ledger:
        with ledger.label(BASE):
            quantization = "nf4" if quantize else "none"
            backbone = Backbone(Base(model=f"random/{kind}", quantization=quantization, device="cpu"))
        with ledger.label(ROLES):
            for role, head in wanted.roles.items():
                backbone.add_role(role, LORA, head=head)
    if checkpointing:
        backbone.enable_gradient_checkpointing()
    return Rehearsal(backbone, wanted, ledger, Rollout())


CASES = {
    "logps": demanded("learn", adds=True),
    "logps, first": demanded("learn"),
    "entropy": demanded("learn", entropy=True, adds=True),
    "score": demanded("learn", "score"),
    "values": demanded("learn", "values"),
    "both": demanded("learn", "both"),
    "packed": demanded("learn", packed=True),
    "read": demanded("read"),
    "generate": demanded("generate", unpacked=True),
}


@pytest.mark.parametrize("quantize", [True, False], ids=["nf4", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_content_it_takes_what_real_tensors_take(small, kind, quantize):
    """The same passes with the same books on a real base, byte by byte but for tables and a few numbers."""
    for name, wanted in CASES.items():
        for checkpointing in (False, True) if name == "logps" else (False,):
            how = {"quantize": quantize, "checkpointing": checkpointing}
            (found,) = bare(kind, wanted, **how).moments(unpack=True)
            (expected,) = real(kind, wanted, **how).moments(unpack=True)
            assert len(found) == len(expected)
            for ours, theirs in zip(found, expected, strict=True):
                base = ours.pop(BASE), theirs.pop(BASE)
                assert base[0] == pytest.approx(base[1], rel=0.01)  # each real layer has a table of 1 KiB of its own
                assert ours.total() == pytest.approx(theirs.total(), rel=2e-3), (name, checkpointing, ours, theirs)


def test_sizes_worked_by_hand():
    """NF4: half a byte a weight, a byte for 64, four for 64 × 256; the embedding and norms in bf16."""
    config = shapes.shape_config("llama-3.2-1b")
    made = Rehearsal.without_content(
        with_layers(config, 1),
        Demand(["policy"], {"policy": True}),
        Lora(r=16),
        Rollout(),
        dtype=torch.bfloat16,
        quantize=True,
    )
    queries = outputs = 2048 * 2048
    keys = values = 2048 * 512
    weights = queries + keys + values + outputs + 3 * 2048 * 8192
    words, norms = 128256 * 2048, 3 * 2048
    rotary, tables = 2 * 32 * 4, (16 + 256) * 4
    nf4 = weights // 2 + weights // 64 + 7 * 4
    adapter = 16 * ((2048 + 2048) * 2 + (2048 + 512) * 2 + (2048 + 8192) * 3) * 4
    head = 2048 * 4
    standing = made.standing()
    assert standing[BASE] == pytest.approx(nf4 + 4 * weights / 64 / 256 + 2 * (words + norms) + tables, abs=rotary)
    assert standing[ROLES] == adapter + head
    assert standing[OPTIMIZER] == 2 * (adapter + head)
    assert standing[UNPACKED] == 2 * weights


@pytest.mark.parametrize(
    ("kind", "rank", "checkpointing"),
    [("llama", 2, False), ("llama", 64, False), ("llama", 64, True), ("qwen2", 2, True), ("smollm3", 2, False)],
)
def test_two_layers_say_what_many_take(small, monkeypatch, kind, rank, checkpointing):
    """Also where gradients take more than activations, and the peak is at the end of backward."""
    monkeypatch.setitem(shapes.SHAPES, kind, {**shapes.SHAPES[kind], "num_hidden_layers": 9})
    recipe = sft(f"random/{kind}", 8, 8, 1, rank, checkpointing)
    found = predict(recipe, device="cpu", room=GIB)
    monkeypatch.setattr("lowrank_rlhf.plan.predict.is_uniform", lambda config: False)
    expected = predict(recipe, device="cpu", room=GIB)
    assert {phase: parts.total() for phase, parts in found.phases.items()} == {
        phase: pytest.approx(parts.total(), rel=1e-6) for phase, parts in expected.phases.items()
    }


def sft(model, prompt, new, micro, rank=4, checkpointing=False):
    overrides = [f"base.model={model}", "data.train=d.jsonl", f"data.max_prompt_tokens={prompt}", f"lora.r={rank}"]
    overrides += [f"data.max_completion_tokens={new}", "train.batch_size=16", f"train.micro_batch_size={micro}"]
    return load_recipe(SFTRecipe, overrides=[*overrides, f"train.gradient_checkpointing={str(checkpointing).lower()}"])


def test_more_rows_longer_rows_and_no_checkpointing_take_more(small):
    def update(*how):
        return predict(sft("random/llama", *how), device="cuda", room=GIB).phases["update"].total()

    sizes = [update(16, 16, 2), update(32, 16, 2), update(32, 32, 2), update(32, 32, 4)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4
    assert update(32, 32, 4, 4, True) < sizes[-1] < update(32, 32, 4, 8)


RECIPE_FILES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.name != "pipeline.yaml")


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda p: p.relative_to(ROOT / "recipes").as_posix())
def test_every_shipped_recipe_is_planned_offline(path):
    recipe = load_recipe(RECIPES[stage_of(str(path))], path)
    plan = predict(recipe, device="cuda", room=24 * GIB)
    assert {"update"} <= set(plan.phases)
    assert 0.2 * GIB < plan.tensors < 24 * GIB
    assert plan.phases[plan.peak_phase].total() == plan.tensors


def test_there_are_recipes():
    assert len(RECIPE_FILES) > 20


def ppo(**data):
    overrides = ["data.train=p.jsonl", "train.batch_size=16", "ppo.minibatches=1", "reward=a:b"]
    return load_recipe(PPORecipe, overrides=[*overrides, *(f"{key.replace('__', '.')}={v}" for key, v in data.items())])


def kinds(recipe, **how):
    return [(p.phase, p.kind, p.role, p.rows) for p in demand(recipe, on_cpu=False, **how).passes]


def test_what_each_stage_asks(tmp_path):
    (tmp_path / "reward/adapters").mkdir(parents=True)
    for member in ("reward", "reward_2"):
        (tmp_path / "reward/adapters" / member).mkdir()
    wanted = demand(ppo(reward_from=f"[{{run: {tmp_path}/reward}}]", policy_from="runs/sft"), on_cpu=True)
    assert wanted.roles == {"policy": False, "start": False, "reward": True, "reward_2": True, "value": True}
    assert wanted.learning == ["policy", "value"]
    assert all(p.unpacked for p in wanted.passes)
    assert kinds(ppo(rollout__batch_size=64))[0] == ("generate", "generate", "policy", 16)
    shared = demand(ppo(value_model__trunk="policy"), on_cpu=False)
    assert (shared.roles, shared.learning) == ({"policy": True}, ["policy"])
    assert shared.passes[-1].reads == "both"
    assert not shared.passes[-1].entropy
    assert demand(ppo(ppo__entropy_coef=0.1), on_cpu=False).passes[-1].entropy
    limited = ppo(train__micro_batch_tokens=1024)
    assert [rows for *_, rows in kinds(limited)] == [16, 2, 2]
    assert kinds(RewardRecipe(data=Data("d")))[0] == ("update", "learn", "reward", 8)
    ensemble = demand(RewardRecipe(data=Data("d"), reward_model=RewardModel(members=3)), on_cpu=False)
    assert (len(ensemble.roles), ensemble.learning) == (3, ["reward"])
    assert kinds(KTORecipe(data=Data("d"), policy_from="runs/sft"))[0] == ("score", "read", "start", 4)


def by_tokens(recipe):
    """A stand-in: an update takes 1 MiB a token of a forward, half with checkpointing, generating one a row."""
    tokens = recipe.data.max_prompt_tokens + recipe.data.max_completion_tokens
    update = recipe.train.micro_batch_size * tokens // (1 + recipe.train.gradient_checkpointing)
    rollout = getattr(recipe, "rollout", Rollout(batch_size=1)).batch_size
    return Plan({"generate": Counter(a=rollout * 2**20), "update": Counter(a=update * 2**20)}, "cuda")


@pytest.mark.parametrize(
    ("mib", "changes"),
    [
        (4 * 512, {}),
        (2 * 512, {"train.micro_batch_size": 2}),  # 1024 tokens keep a card busy
        (2 * 512 - 1, {"train.gradient_checkpointing": True, "train.micro_batch_size": 2}),
        (256, {"train.gradient_checkpointing": True, "train.micro_batch_size": 1}),
        (200, {"train.gradient_checkpointing": True, "train.micro_batch_size": 1, "data.max_completion_tokens": 128}),
        (20, None),
    ],
)
def test_the_cheapest_changes_that_are_enough(mib, changes):
    found = make_fit(SFTRecipe(data=Data("d")), by_tokens, mib * 2**20 + int(1.5 * GIB))
    assert found == changes


def test_each_phase_has_its_own_change():
    room = 1024 * 2**20 + int(1.5 * GIB)
    recipe = ppo(rollout__batch_size=4096, train__batch_size=4096)
    assert make_fit(recipe, by_tokens, room) == {"rollout.batch_size": 1024, "train.micro_batch_size": 2}


def test_what_would_be_another_loss_is_not_advised():
    room = 1024 * 2**20 + int(1.5 * GIB)
    assert make_fit(KTORecipe(data=Data("d")), by_tokens, room) == {"train.gradient_checkpointing": True}


def test_a_changed_recipe_is_as_consistent_as_before():
    """15 prompts cannot be halved into micro-batches of 7: 5 is the next."""
    recipe = ppo(train__batch_size=15, train__micro_batch_size=15)
    assert make_fit(recipe, by_tokens, 6 * 512 * 2**20 + int(1.5 * GIB)) != {"train.micro_batch_size": 7}


def say(capsys, *words):
    status = main(["plan", *map(str, words)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_it_says_whether_it_fits(capsys):
    status, out, _ = say(capsys, ROOT / "recipes/ppo.yaml", "--gpu", 12)
    assert status == 0
    assert "fits a card of 12 GiB" in out
    assert [line.split()[0] for line in out.splitlines() if line][1:4] == ["GiB", "base", "adapters,"]
    status, out, _ = say(capsys, ROOT / "recipes/ppo.yaml", "--gpu", 2)
    assert status == 1
    assert "does not fit a card of 2 GiB" in out


def test_fit_writes_a_recipe_that_fits(capsys, tmp_path):
    recipe = tmp_path / "sft_mine.yaml"
    recipe.write_text("base:\n  model: tiny\ndata:\n  train: d.jsonl\n", encoding="utf-8")
    wide = ("train.micro_batch_size=512", "train.batch_size=512")
    status, out, _ = say(capsys, recipe, "--fit", 2, *wide)
    written = tmp_path / "sft_mine_2gb.yaml"
    assert status == 0
    assert f"written to {written}" in out
    assert written.read_text().splitlines()[0] == f"# lowrank-rlhf sft --config {written}"
    assert load_recipe(SFTRecipe, written).train.batch_size == 512
    assert load_recipe(SFTRecipe, written).train.micro_batch_size < 512
    status, out, _ = say(capsys, written, "--gpu", 2)
    assert (status, "\nfits a card of 2 GiB" in out) == (0, True)
    status, _, err = say(capsys, recipe, "--fit", 2, *wide)
    assert (status, err.splitlines()) == (
        2,
        [f"error: --fit: {written} is there already; remove it, or choose another with --out FILE"],
    )
    assert say(capsys, recipe, "--fit", 2, "--out", tmp_path / "sft_other.yaml", *wide)[0] == 0


def test_a_pipeline_is_planned_stage_by_stage(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    status, out, _ = say(capsys, "recipes/pipeline.yaml", "--gpu", 8)
    assert status == 0
    assert out.count("fits a card of 8 GiB") == 6


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["recipes/sft.yaml", "base.model=nobody/nothing"], "base.model: the config of 'nobody/nothing'"),
        (["recipes/sft.yaml", "base.model=random/none"], "base.model: no shape 'none'"),
        (["recipes/pipeline.yaml", "--fit", "8"], "--fit: writes one stage's recipe"),
        (["recipes/sft.yaml", "--out", "x.yaml"], "--out: says where --fit GB writes"),
        (["recipes/sft.yaml", "--gpu", "0"], "--gpu: the memory of a card in GiB"),
        (["recipes/sft.yaml", "train.micro_batch_size=3"], "train.batch_size: 8 is not a multiple"),
        (["mine.yaml"], "mine.yaml: the file's name is to begin with its stage"),
    ],
)
def test_what_cannot_be_planned_is_told(capsys, monkeypatch, words, reason):
    monkeypatch.chdir(ROOT)
    status, out, err = say(capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {reason}")


def test_the_end_of_a_run_says_both_peaks(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    words = ["sft", "--config", "recipes/sft.yaml", "--tiny", f"run_dir={tmp_path}/run", "base.device=cpu"]
    assert main(words) == 0
    info = json.loads((tmp_path / "run/run.json").read_text())
    measured, predicted = info["peak_memory_gib"]["ram"], info["predicted_memory_gib"]
    assert info["memory_error"] == pytest.approx(predicted / measured - 1, abs=0.01)
    assert 0.5 < predicted < 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: "))
    assert line.startswith(f"memory: {measured:.2f} GiB measured at the peak, {predicted:.2f} predicted")


def test_a_run_that_cannot_be_planned_says_why(capsys, tmp_path):
    run = SimpleNamespace(info={"base": {"device": "cpu"}, "data_report": {"tokens": {}}})
    compare_memory(SFTRecipe(data=Data("d"), base=Base("random/none")), run)
    assert capsys.readouterr().out.startswith("memory: not predicted for this base: base.model: no shape 'none'")


def test_rows_are_no_longer_than_the_data():
    data = as_long_as_its_rows(SFTRecipe(data=Data("d")), {"prompt": 40, "completion": 9999}).data
    assert (data.max_prompt_tokens, data.max_completion_tokens) == (40, 256)


STAGES = ("sft", "reward", "ppo", "grpo", "dpo", "orpo", "kto")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_within_15_percent_of_what_is_resident(tmp_path, stage):
    """On the embedded base: two steps of two micro-batches of four rows that fill their limits."""
    text = "one two three four five six seven eight nine ten " * 20
    rows = [{"prompt": f"{text}{n}", "completion": text, "chosen": text, "rejected": f"no {text}"} for n in range(8)]
    kept = {"sft": ("prompt", "completion"), "ppo": ("prompt",), "grpo": ("prompt",)}
    columns = kept.get(stage, ("prompt", "chosen", "rejected"))
    lines = [json.dumps({name: row[name] for name in columns}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    micro = 2 if stage in ("reward", "dpo", "orpo") else 4
    words = [f"run_dir={tmp_path}/run", f"data.train={tmp_path}/rows.jsonl", "data.eval=null", "data.eval_fraction=0"]
    words += ["data.max_prompt_tokens=96", "data.max_completion_tokens=32", "train.max_steps=2", "data.max_rows=null"]
    words += [f"train.micro_batch_size={micro}", f"train.batch_size={2 * micro}", "base.device=cpu"]
    if stage in ("ppo", "grpo"):  # at this temperature no answer ends before its limit
        words += ["rollout.temperature=5", "reward=recipes.rewards:concise", f"{stage}.minibatches=1"]
    if stage == "grpo":
        words += ["grpo.group_size=4", "train.batch_size=2"]
    command = [sys.executable, "-m", "lowrank_rlhf.cli", stage, "--config", f"recipes/{stage}.yaml", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(stage, next(line for line in done.stdout.splitlines() if line.startswith("memory: ")))
    assert abs(json.loads((tmp_path / "run/run.json").read_text())["memory_error"]) <= 0.15
