"""Where memory runs out: smaller pieces, the same gradients; said once, remembered, undone to the bit.

The memory of these tests ends where a forward takes more rows than `holds`; real allocators are asked at the end.
"""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from lowrank_rlhf import processes, rollout, runs
from lowrank_rlhf.backbone import Backbone, passes
from lowrank_rlhf.cli import main as cli_main
from lowrank_rlhf.config import Base, Lora, PPORecipe
from lowrank_rlhf.config import Rollout as RolloutSettings
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.loader import load_recipe
from lowrank_rlhf.out_of_memory import GENERATE, LEARN, SCORE, MostRows, is_out_of_memory
from lowrank_rlhf.stages.ppo import PPO
from tests.preference_runs import PAIRS, write

ROOT = Path(__file__).parent.parent
STEPS = 3
CLOCKS = ("seconds", "tokens_per_second", "gib", "runtime", "per_second", "phase", "time")
# Rows of a forward and backward: 4, of pairs both answers
STAGES = {
    "sft": 4,
    "reward": 8,
    "dpo": 8,
    "orpo": 8,
    "kto": 4,
    "ppo": 4,
    "grpo": 4,
}
# Where a mistake in one stage would hide: losses that look at the whole micro-batch, states that two losses share
VARIANTS = {
    "sft packed": ["train.packing=true", "data.max_completion_tokens=8"],
    "dpo coupled": ["dpo.loss_type=[aot, sft]"],
    "dpo precomputed": ["dpo.precompute_reference=true"],
    "ppo shared": ["value_model.trunk=policy", "ptx.data=recipes/quickstart/data/demonstrations.jsonl"],
    "ppo checkpointed": ["train.gradient_checkpointing=true"],
    "grpo sequences": ["grpo.loss_aggregation=sequence"],
}
WHOLE = {}  # trainings with memory enough, by name


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


class Memory:
    """Too small for a pass of more rows than it holds; counts how often it was too small."""

    def __init__(self, monkeypatch, holds, *, where):
        self.failures = self.passes = 0
        hidden = Backbone.hidden

        def limited(backbone, ids, mask, positions=None):
            rows = len(passes.documents(positions)) if positions is not None else len(ids)
            kind = "learn" if torch.is_grad_enabled() else "score"
            self.passes += kind == "learn"
            # Late is in the second micro-batch of a step: the first has its gradients already
            spared = rows <= holds or not where.startswith(kind) or (where.endswith("late") and self.passes < 2)
            if spared:
                return hidden(backbone, ids, mask, positions)
            torch.rand(3)  # as dropout would draw
            if where == "learn forward":
                self.full()
            if where == "score":
                self.full()
            return self.full_in_backward(backbone, lambda: hidden(backbone, ids, mask, positions))

        monkeypatch.setattr(Backbone, "hidden", limited)

    def full(self, *_):
        self.failures += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def full_in_backward(self, backbone, forward):
        """In the lowest layer, when those above have their gradients already."""

        def hook(module, inputs, output):
            (output[0] if isinstance(output, tuple) else output).register_hook(self.full)

        handle = backbone.model.base_model.layers[0].register_forward_hook(hook)
        try:
            return forward()
        finally:
            handle.remove()


@pytest.fixture
def data(tmp_path):
    """Sixteen rows of different lengths, of any kind a stage learns from; an odd number of them is held out."""
    pairs = [{**row, "prompt": row["prompt"] + "!" * i} for i, row in enumerate(PAIRS)]
    write(tmp_path / "pairs.jsonl", pairs)
    write(tmp_path / "eval.jsonl", pairs[:5])
    return tmp_path


def arguments(name, data, run_dir, *more):
    """Float32, steps of two micro-batches, on adapters whose weights all have a gradient from the second step on."""
    stage = name.partition(" ")[0]
    rows, held_out = f"{data}/pairs.jsonl", f"{data}/eval.jsonl"
    if stage == "sft":
        rows, held_out = (
            str(write(data / f"sft_{Path(path).name}", demonstrations(path))) for path in (rows, held_out)
        )
    changes = [
        f"run_dir={run_dir}",
        f"data.train={rows}",
        f"data.eval={held_out}",
        "data.max_rows=null",
        "base.quantization=none",
        "base.device=cpu",
        f"train.max_steps={STEPS}",
        "train.batch_size=8",
        "train.micro_batch_size=4",
        "train.learning_rate=1e-4",  # Adam makes a rounding of a tiny gradient a step of this size
        "save.steps=1",
    ]
    if stage in ("ppo", "grpo"):
        changes += ["rollout.batch_size=8", f"{stage}.inner_epochs=2", "reward_from=[]"]
        changes += ["reward=tests.reward_functions:lowercase", f"{stage}.minibatches=1", "policy_from=null"]
    if stage == "grpo":
        changes += ["train.batch_size=4"]
    return [stage, "--config", f"recipes/{stage}.yaml", "--tiny", *changes, *VARIANTS.get(name, []), *more]


def demonstrations(path):
    rows = map(json.loads, Path(path).read_text().splitlines())
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]


@pytest.fixture
def train(data, monkeypatch):
    """A training's gradients before clipping, step by step, its weights and its metrics rows."""

    def start(name, folder, *more):
        gradients = []
        clip = torch.nn.utils.clip_grad_norm_

        def keep(parameters, *args, **kwargs):
            parameters = list(parameters)
            gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).clone())
            return clip(parameters, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
            status = cli_main(arguments(name, data, data / folder, *more))
        assert status in (0, None)
        weights = {p.parent.name: load_file(p) for p in sorted((data / folder).glob("adapters/*/*.safetensors"))}
        rows = [json.loads(line) for line in (data / folder / "metrics.jsonl").read_text().splitlines()]
        return gradients, weights, rows

    return start


def figures(rows):
    """Without times, and without the accuracy where the answers of a pair are as good: rounding decides it."""
    rows = [{k: v for k, v in row.items() if not any(word in k for word in CLOCKS)} for row in rows]
    for row in rows:
        if abs(row.get("rewards/margins", 1)) < 1e-6:
            row.pop("rewards/accuracies", None)
    return rows


def assert_same(found, expected):
    """Gradients and weights to 1e-6, and every figure that is not a time."""
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert theirs.abs().max() > 1e-4
        assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert_close(found[1], expected[1], rtol=0, atol=2e-6)
    for ours, theirs in zip(figures(found[2]), figures(expected[2]), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-4)


# Every stage


@pytest.mark.parametrize(
    ("name", "where"),
    [(name, where) for name in STAGES for where in ("learn backward", "score")]
    + [(name, "learn backward") for name in VARIANTS]
    + [(name, where) for name in ("sft", "orpo", "ppo") for where in ("learn forward", "learn backward late")],
)
def test_the_steps_are_the_same_and_it_is_said_once(name, where, train, monkeypatch, capsys):
    if name not in WHOLE:
        WHOLE[name] = train(name, "whole")
    capsys.readouterr()
    memory = Memory(monkeypatch, 2, where=where)
    found = train(name, "pieces")
    assert_same(found, WHOLE[name])
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert memory.failures == len(said) > 0
    assert len(said) <= 4, "4 or 8 rows, or 16 held-out answers, are halved until two are left, and not again"
    stage = name.partition(" ")[0]
    assert said[-1].startswith(f"{stage}: out of memory in a forward")
    assert " rows; from now on 2 at a time, which changes nothing but the speed" in said[-1]
    if where != "score":
        assert memory.failures == (2 if STAGES[stage] == 8 else len(said))
    advice = {"sft": 2, "reward": 1, "dpo": 1, "orpo": 1, "ppo": 2, "grpo": 2}
    if stage in advice and name not in ("sft packed", "dpo coupled"):
        assert said[-1].endswith(f"; train.micro_batch_size={advice[stage]} avoids the failed attempt")
    else:
        assert "micro_batch_size" not in said[-1], "it would be another loss"


@pytest.mark.parametrize("name", STAGES)
def test_a_resumed_run_knows_what_fits(name, train, data, monkeypatch, capsys):
    memory = Memory(monkeypatch, 2, where="learn forward")
    expected = train(name, "whole")
    log = runs.Run.log

    def stop_after_first(self, step, metrics):
        log(self, step, metrics)
        self.stopping = self.stopping or step == 1

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "log", stop_after_first)
        cli_main(arguments(name, data, data / "broken"))
    assert len((data / "broken" / "metrics.jsonl").read_text().splitlines()) < len(expected[2])
    capsys.readouterr()
    memory.failures = 0
    _, weights, _ = train(name, "broken", "--resume")
    assert memory.failures == 0
    assert "out of memory" not in capsys.readouterr().out
    assert_close(weights, expected[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", STAGES)
def test_one_row_that_does_not_fit_is_the_users_to_change(name, data, monkeypatch, capsys):
    Memory(monkeypatch, 0, where="learn forward")
    assert cli_main(arguments(name, data, data / "run")) == 2
    said = capsys.readouterr().err
    assert "out of memory in a forward and backward of one row: lower data.max_prompt_tokens or data.max_com" in said
    assert "train.gradient_checkpointing: true" in said
    assert "base.model" in said


def test_the_next_micro_batches_are_as_small_from_the_start(monkeypatch):
    """So that nothing is computed twice any more."""
    ppo = PPO(ppo_recipe())
    Memory(monkeypatch, 2, where="learn forward")
    recomputed = []
    checkpoint = passes.checkpoint
    monkeypatch.setattr(passes, "checkpoint", lambda *a, **k: recomputed.append(1) or checkpoint(*a, **k))
    experiences, _ = ppo.collect()
    assert [len(e.rows) for e in experiences] == [4, 4]
    ppo.update(experiences)
    assert len(recomputed) == 8, "policy and value, two micro-batches each, in two pieces each"
    experiences, _ = ppo.collect()
    assert [len(e.rows) for e in experiences] == [2, 2, 2, 2]
    ppo.update(experiences)
    assert len(recomputed) == 8


def ppo_recipe(*overrides):
    settings = ["base.model=tiny", "base.quantization=none", "base.device=cpu"]
    settings += ["data.train=tests/learning_prompts.jsonl", "reward=tests.reward_functions:lowercase"]
    settings += ["data.max_prompt_tokens=16", "data.max_completion_tokens=8", "train.batch_size=8"]
    settings += ["rollout.batch_size=8", "ppo.minibatches=1", "ppo.inner_epochs=1"]
    return load_recipe(PPORecipe, overrides=settings + list(overrides))


# Generation


def test_answers_are_those_of_the_smaller_batch_from_the_start(monkeypatch, capsys):
    """The failed attempt has drawn random numbers, and none of them is missing afterwards."""
    whole = PPO(ppo_recipe("rollout.batch_size=2"))
    torch.manual_seed(1)
    expected = whole.on_policy.roll_out(prompts(whole))
    tight = PPO(ppo_recipe())
    failures, complete = [], rollout._complete

    def limited(model, ids, *args):
        if len(ids) > 2:
            torch.rand(5)
            failures.append(len(ids))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return complete(model, ids, *args)

    monkeypatch.setattr(rollout, "_complete", limited)
    capsys.readouterr()
    torch.manual_seed(1)
    assert tight.on_policy.roll_out(prompts(tight)) == expected
    tight.on_policy.roll_out(prompts(tight))
    assert failures == [8, 4]
    said = capsys.readouterr().out
    assert "ppo: out of memory in generating of 8 rows; from now on 4 at a time" in said
    assert "where it samples other draws; rollout.batch_size=2 avoids the failed attempt" in said
    assert tight.backbone.most_rows.rows == {GENERATE: 2}


def prompts(ppo):
    return ppo.on_policy.order.take(8)


def test_outside_a_stage_the_error_is_the_callers(monkeypatch):
    """The app frees adapters and says what to close; what `sample` writes depends on the size of its batches."""
    backbone = Backbone(Base(model="tiny", quantization="none", device="cpu"))

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(rollout, "_complete", full)
    with pytest.raises(torch.OutOfMemoryError):
        rollout.generate(backbone, None, [[1, 2]] * 4, RolloutSettings(), max_new_tokens=2, stop_ids=[0])


# What is undone


@pytest.fixture
def learner():
    """A policy with dropout, four rows, and its log-probs' sum as a loss."""
    backbone = Backbone(Base(model="tiny", quantization="none", device="cpu"))
    backbone.add_role("policy", Lora(r=4, dropout=0.5))
    backbone.train_only("policy")
    backbone.most_rows = MostRows("sft")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in backbone.parameters("policy"):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    ids = torch.randint(5, 200, (4, 12), generator=generator)
    completion = torch.zeros(4, 12, dtype=torch.bool)
    completion[:, 4:] = True

    def loss():
        torch.manual_seed(3)
        with backbone.use("policy", train=True):
            backbone.read(ids, torch.ones_like(completion), completion)[0].sum().backward()

    return backbone, loss


def gradients(backbone):
    found = [p.grad.clone() for p in backbone.parameters("policy")]
    for p in backbone.parameters("policy"):
        p.grad = None
    return found


def test_dropout_is_drawn_once_for_each_piece(learner, monkeypatch):
    """Backward recomputes a piece with the noise of its forward, or the gradient would be that of another loss."""
    backbone, loss = learner
    backbone.most_rows.rows[LEARN] = 2
    loss()
    found = gradients(backbone)
    monkeypatch.setattr(passes, "checkpoint", lambda work, *inputs, **how: work(*inputs))
    loss()
    assert_close(found, gradients(backbone), rtol=0, atol=1e-6)


def test_gradients_and_random_numbers_are_as_before_the_failed_attempt(learner):
    backbone, _ = learner
    before = [torch.randn_like(p) for p in backbone.parameters("policy")]
    for p, gradient in zip(backbone.parameters("policy"), before, strict=True):
        p.grad = gradient.clone()
    attempts = []

    def work():
        attempts.append((torch.rand(1), [p.grad for p in backbone.parameters("policy")]))
        for p in backbone.parameters("policy"):
            p.grad = torch.ones_like(p)
        if len(attempts) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    backbone.learn(4, work)
    assert backbone.most_rows.rows == {LEARN: 1}
    assert len({float(drawn) for drawn, _ in attempts}) == 1
    assert all(p is None for _, found in attempts for p in found)
    assert_close(gradients(backbone), [gradient + 1 for gradient in before], rtol=0, atol=0)


def test_another_error_is_not_taken_for_one_of_memory(learner):
    backbone, _ = learner

    def work():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        backbone.learn(4, work)
    assert backbone.most_rows.rows == {}


def test_nothing_of_a_failed_attempt_is_alive_in_the_next(learner, monkeypatch):
    """Its tensors hang on the frames of the error, which has to be gone when memory is asked for again."""
    backbone, _ = learner
    seen = []

    def work():
        alive = [ref() is not None for ref in seen]
        large = torch.zeros(1000)
        seen.append(weakref.ref(large))
        assert not any(alive)
        if len(seen) < 3:
            raise torch.OutOfMemoryError(f"CUDA out of memory beside {large.numel()}.")

    backbone.learn(4, work)
    assert len(seen) == 3


# What is remembered


def test_rows_are_halved_up_and_each_work_has_its_own(capsys):
    most = MostRows("ppo", generation_key="rollout.batch_size")

    def room_for(rows):
        def do(piece):
            if piece.stop - piece.start > rows:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return piece.stop - piece.start

        return do

    assert most.each(SCORE, 7, room_for(3)) == [2, 2, 2, 1]
    assert most.each(SCORE, 3, room_for(3)) == [2, 1]
    assert most.each(GENERATE, 7, room_for(7)) == [7]
    assert most.rows == {SCORE: 2}
    assert most.of(8, LEARN), most.of(8, LEARN, SCORE) == (8, 2)
    with pytest.raises(UserError, match="out of memory in generating of one row"):
        most.each(GENERATE, 2, room_for(0))


def test_of_several_processes_the_smallest_is_kept(monkeypatch):
    most = MostRows("sft")
    most.rows = {LEARN: 4}
    monkeypatch.setattr(processes, "gather", lambda value: [value, {LEARN: 2, SCORE: 8}, {}])
    assert most.state_dict() == {LEARN: 2, SCORE: 8}


# What allocators say


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried"),
        MemoryError(),
    ],
)
def test_memory_that_ran_out_is_recognised(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(ValueError(str(error) or "out of memory"))


def test_so_is_what_torch_says_here():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
