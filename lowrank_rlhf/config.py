"""Typed recipes: every key of every stage, its type, range and default. `loader` reads them, strictly."""

from dataclasses import dataclass, field
from typing import Any, Literal


def ranged(default: Any, low: float, high: float = float("inf")) -> Any:
    """A numeric field whose value must lie in [low, high]."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True)
class Base:
    """The one base model. `model`: `smollm2-135m-instruct` (embedded), a hub id, a local folder, or `tiny`."""

    model: str = "smollm2-135m-instruct"
    quantization: Literal["nf4", "none"] = "nf4"
    device: str = "auto"
    revision: str | None = None


@dataclass(frozen=True)
class Lora:
    """Every role's adapter. `target_modules`: `all-linear`, or a list of module names (never lm_head)."""

    r: int = ranged(16, 1)
    alpha: float = ranged(32, 0)
    dropout: float = ranged(0.0, 0, 1)
    target_modules: str | list[str] = "all-linear"
    rslora: bool = False


@dataclass(frozen=True)
class Data:
    """Where examples come from. Without `eval`, `eval_fraction` of the prompts of `train` are held out, by prompt.

    `columns` renames, ours: theirs. `loss_on`: SFT learns the last answer of a dialogue, or all the assistant's turns.
    """

    train: str
    eval: str | None = None
    eval_fraction: float = ranged(0.1, 0, 0.9)
    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    on_bad_row: Literal["error", "skip"] = "error"
    loss_on: Literal["last", "all"] = "last"
    prompt_template: str = "Instruction: {prompt}\nResponse: "
    max_rows: int | None = ranged(None, 2)
    max_prompt_tokens: int = ranged(256, 1)
    max_completion_tokens: int = ranged(256, 1)


@dataclass(frozen=True)
class Train:
    """Supervised training. `batch_size` sequences (or pairs) per optimizer step, `micro_batch_size` per forward."""

    epochs: float = ranged(1.0, 0)
    max_steps: int | None = ranged(None, 1)
    batch_size: int = ranged(16, 1)
    micro_batch_size: int = ranged(4, 1)
    learning_rate: float = ranged(2e-4, 0)
    warmup_ratio: float = ranged(0.05, 0, 1)
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = ranged(0.0, 0)
    max_grad_norm: float = ranged(1.0, 0)
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class SFTTrain(Train):
    """`packing`: a sequence is as many rows as fit into the token limits together, each unseen by the others."""

    packing: bool = False


@dataclass(frozen=True)
class PPOTrain:
    """`max_steps` counts rollout iterations, `batch_size` the prompts of each.

    A forward takes at most `micro_batch_size` rows and, where given, at most `micro_batch_tokens` padded tokens.
    """

    max_steps: int = ranged(20, 1)
    batch_size: int = ranged(16, 1)
    micro_batch_size: int = ranged(4, 1)
    micro_batch_tokens: int | None = ranged(None, 1)
    learning_rate: float = ranged(1e-4, 0)
    warmup_ratio: float = ranged(0.0, 0, 1)
    lr_schedule: Literal["linear", "cosine", "constant"] = "constant"
    weight_decay: float = ranged(0.0, 0)
    max_grad_norm: float = ranged(1.0, 0)
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class Eval:
    """Held-out evaluation every `steps` optimizer steps, besides step 0 and the end. None: only those two.

    `patience`: stop after this many evaluations without a new best, and keep the weights of the best one.
    """

    steps: int | None = ranged(None, 1)
    patience: int | None = ranged(None, 1)


@dataclass(frozen=True)
class Save:
    """A checkpoint every `steps` optimizer steps (PPO: iterations), the newest `keep` of them kept; None: only when
    the run is stopped."""

    steps: int | None = ranged(50, 1)
    keep: int = ranged(2, 1)


@dataclass(frozen=True)
class Track:
    """Experiment trackers beside metrics.jsonl. W&B sends data to its servers; the others stay on this machine."""

    report_to: list[Literal["tensorboard", "trackio", "wandb"]] = field(default_factory=list)
    project: str = "lowrank-rlhf"


@dataclass(frozen=True)
class RewardModel:
    """How the reward role starts and learns.

    `init_from`: a run whose `sft` adapter the reward adapter starts as a copy of; None starts it at zero.
    `pooling`: the head reads the last attended token, or the mean of all attended ones.
    `label_smoothing`: the share of labels taken to be wrong. `center_coef`: pull of the scores towards 0.
    `balance_length`: each epoch shows as many pairs whose chosen answer is the longer as pairs where it is the shorter.
    `members`: adapters of an ensemble, each with its own start and order of the data.
    """

    init_from: str | None = None
    pooling: Literal["last", "mean"] = "last"
    label_smoothing: float = ranged(0.0, 0, 0.5)
    center_coef: float = ranged(0.01, 0)
    balance_length: bool = False
    members: int = ranged(1, 1, 9)


@dataclass(frozen=True)
class RewardSource:
    """A reward run and its weight in the sum of scores.

    `combine`: of an ensemble's members the mean, the minimum, or the mean minus `std_coef` standard deviations.
    """

    run: str
    weight: float = ranged(1.0, float("-inf"))
    combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    std_coef: float = ranged(1.0, 0)


@dataclass(frozen=True)
class PPO:
    """The update. `inner_epochs` passes over each rollout batch, cut into `minibatches` optimizer steps.

    `whiten`: advantages, over all completion tokens of the batch. `entropy_coef`: weight of the entropy per token.
    `target_kl_stop`: no further minibatch is learned from a batch once approx-KL (nats per token) has passed this.
    """

    inner_epochs: int = ranged(2, 1)
    minibatches: int = ranged(2, 1)
    clip_range: float = ranged(0.2, 0)
    value_clip_range: float = ranged(0.2, 0)
    gamma: float = ranged(1.0, 0, 1)
    gae_lambda: float = ranged(0.95, 0, 1)
    whiten: bool = True
    entropy_coef: float = ranged(0.0, 0)
    target_kl_stop: float | None = ranged(None, 0)


@dataclass(frozen=True)
class Rollout:
    """Sampling, `batch_size` prompts at a time. The defaults sample from exactly the distribution that is scored.

    `missing_eos_penalty`: taken off the score of an answer that the token limit cut.
    `curriculum`: a numeric column of the prompts; the first epoch goes from its smallest value to its largest.
    `show_steps`: every so many iterations two answers are printed and kept in `samples.jsonl`.
    """

    batch_size: int = ranged(16, 1)
    temperature: float = ranged(1.0, 1e-3)
    top_p: float = ranged(1.0, 1e-6, 1)
    top_k: int = ranged(0, 0)
    missing_eos_penalty: float = ranged(0.0, 0)
    curriculum: str | None = None
    show_steps: int | None = ranged(10, 1)


@dataclass(frozen=True)
class ScoreShaping:
    """A score before it is a reward, in this order. `scale`: divided by the running standard deviation of all so far.
    `clip`: kept in [-clip, clip]. `length_penalty`: score units per completion token, taken off."""

    scale: bool = False
    clip: float | None = ranged(None, 0)
    length_penalty: float = ranged(0.0, 0)


@dataclass(frozen=True)
class Shaping(ScoreShaping):
    """`whiten`: token rewards to variance 1, mean kept, after the scores were shaped."""

    whiten: bool = False


@dataclass(frozen=True)
class KL:
    """The leash: `coef` score units per nat of KL to the reference, inside the reward or, else, in the policy's loss.

    `target`: nats per completion; above it the coefficient rises, below it falls, up to 20 % in `horizon` completions.
    `clip`: of the KL of one token, in nats. `refresh_steps`: every so many iterations the reference becomes a frozen
    copy of the policy.
    """

    coef: float = ranged(0.05, 0)
    estimator: Literal["k1", "k2", "k3"] = "k1"
    in_reward: bool = True
    target: float | None = ranged(None, 1e-6)
    horizon: int = ranged(1000, 1)
    clip: float | None = ranged(None, 0)
    refresh_steps: int | None = ranged(None, 1)


@dataclass(frozen=True)
class ValueModel:
    """`init: auto` copies the reward adapter and head where there is one, else starts at zero.

    `trunk: policy` puts the value head on the policy's own adapter: one role less in memory, one loss for both, in
    which the value loss has the weight `coef`.
    """

    init: Literal["auto", "reward", "policy", "zero"] = "auto"
    trunk: Literal["own", "policy"] = "own"
    coef: float = ranged(0.1, 0)
    learning_rate: float = ranged(1e-4, 0)


@dataclass(frozen=True)
class Ptx:
    """The SFT mix: `coef` times the loss on demonstrations is added to every policy step; nothing without `data`."""

    data: str | None = None
    coef: float = ranged(1.0, 0)


@dataclass(frozen=True)
class Run:
    """Keys every recipe has. Without `run_dir` the run gets an unused `runs/NAME`."""

    run_dir: str | None = None
    seed: int = ranged(0, 0)
    base: Base = field(default_factory=Base)
    lora: Lora = field(default_factory=Lora)
    save: Save = field(default_factory=Save)
    track: Track = field(default_factory=Track)


@dataclass(frozen=True, kw_only=True)
class SFTRecipe(Run):
    stage = "sft"
    data: Data
    train: SFTTrain = field(default_factory=SFTTrain)
    eval: Eval = field(default_factory=Eval)


@dataclass(frozen=True, kw_only=True)
class RewardRecipe(Run):
    stage = "reward"
    data: Data
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    reward_model: RewardModel = field(default_factory=RewardModel)


@dataclass(frozen=True, kw_only=True)
class OnPolicyRecipe(Run):
    """What PPO and GRPO, which learn from their own rollouts, have in common."""

    stage = ""
    data: Data
    train: PPOTrain = field(default_factory=PPOTrain)
    policy_from: str | None = None
    reward_from: list[RewardSource] = field(default_factory=list)
    reward: str | None = None
    reference: Literal["auto", "base", "start"] = "auto"
    rollout: Rollout = field(default_factory=Rollout)
    shaping: ScoreShaping = field(default_factory=ScoreShaping)
    kl: KL = field(default_factory=KL)


@dataclass(frozen=True, kw_only=True)
class PPORecipe(OnPolicyRecipe):
    stage = "ppo"
    shaping: Shaping = field(default_factory=Shaping)
    ppo: PPO = field(default_factory=PPO)
    value_model: ValueModel = field(default_factory=ValueModel)
    ptx: Ptx = field(default_factory=Ptx)
