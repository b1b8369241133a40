"""What a PPO or GRPO run can suffer from: how each trouble shows, from where on, and what helps."""

import math
from collections.abc import Callable
from dataclasses import dataclass

# Nats per completion above the start. trl's training FAQ wants 0 to 10. Somewhere beyond, the true quality turns down
# while the score still rises (Stiennon et al. 2020, arXiv:2009.01325, fig. 5; Gao et al. 2022, arXiv:2210.10760); it
# depends on the reward model where: this is a point to look, not a limit.
KL_BUDGET = 15.0
# The true KL is ≥ 0 and its estimate stays near it when the scored distribution is the sampled one; rounding in 4 bit
# and the noise of a batch are tenths of a nat.
KL_NEGATIVE = 1.0
# PPO means to clip the tail: 0.02 to 0.2 is common. Above this, nearly half of the tokens give no gradient.
CLIP_FRACTION = 0.4
# Nats per token. PPO implementations stop an update at 0.01 to 0.02 (`ppo.target_kl_stop`); this is far beyond.
APPROX_KL = 0.1
# Mean π/π_old is 1 but for what one update changes; trl's PPO page calls 2 and 0.1 signs of too drastic updates.
RATIO = 2.0
# 0 is what a constant predicts; below, the values add noise to the advantages. A fresh head starts there.
EXPLAINED_VARIANCE, EXPLAINED_VARIANCE_ROWS = -0.1, 8
# Of the start. A policy that learns loses some entropy; at a third it has a few fixed continuations left.
ENTROPY_SHARE = 0.3
ENTROPY_GROWTH = 2.0
DISTINCT_SHARE = 0.5
# Rewards learned from people pay for length (Singhal et al. 2023, arXiv:2310.03716), so growth alone proves nothing
LENGTH_GROWTH, LENGTH_SHARE = 2.0, 0.3
LIMIT_SHARE, LIMIT_START = 0.95, 0.8  # of the token limit: where it is now, and what it was below
# Share of 3-grams said before, in addition to the start; answers of people have a few in a hundred
REPETITION = 0.2
# Members agree on what they were trained on and differ elsewhere (Coste et al. 2023, arXiv:2310.02743)
DISAGREEMENT = 2.0
# At least; in small batches four standard errors of (median of WINDOW − median of START) of a share of 0.5
EOS_DROP, EOS_NOISE = 0.25, 1.7

# Of GRPO's groups: one in ten is left to learn from
ZERO_STD_SHARE = 0.9


@dataclass(frozen=True)
class Seen:
    """One figure of a run, as a rule judges it.

    Attributes:
        now: median over the last iterations.
        start: median over the first.
        last: its newest values, the newest at the end.
        completions: rollouts per iteration.
        max_tokens: the limit of a completion.
        stage: whose group of the recipe has the keys that help.
    """

    now: float
    start: float
    last: list[float]
    completions: int
    max_tokens: int
    stage: str = "ppo"


@dataclass(frozen=True)
class Rule:
    """A cause to warn of.

    Attributes:
        figure: the name of what is judged, see `stability.figures`.
        badness: 1 is where the warning comes.
        words: what was seen, what it usually means and what to do: a format of the fields of `Seen`.
    """

    figure: str
    badness: Callable[[Seen], float]
    words: str


def _fallen(seen: Seen, share: float) -> float:
    """1 where the figure has fallen to `share` of its start."""
    return share * seen.start / max(seen.now, 1e-9) if seen.start > 0 else 0.0


def _grown(seen: Seen, factor: float) -> float:
    """1 where the figure has grown to `factor` times its start; a start of 0 has no factor."""
    return seen.now / (factor * seen.start) if seen.start > 1e-6 else 0.0


def _always_negative(last: list[float]) -> bool:
    last = last[-EXPLAINED_VARIANCE_ROWS:]
    return len(last) == EXPLAINED_VARIANCE_ROWS and max(last) < 0


def _eos_drop(completions: int) -> float:
    """How far the share of ended answers may fall: 0.25, or where batches are small what noise cannot do.

    >>> round(_eos_drop(16), 3), _eos_drop(256)
    (0.425, 0.25)
    """
    return max(EOS_DROP, EOS_NOISE / math.sqrt(completions))


# Cause → rule; `kl` and `finite`, which look at more than one figure, are in Watch
RULES = {
    "length": Rule(
        "objective/length",
        lambda seen: _grown(seen, LENGTH_GROWTH),
        "completions grew from {start:.0f} to {now:.0f} tokens: the reward may pay for length (reward hacking); see "
        "what `lowrank-rlhf evaluate reward` says of length, train the reward with reward_model.balance_length, or set "
        "shaping.length_penalty",
    ),
    "limit": Rule(
        "length share",
        lambda seen: seen.now / LIMIT_SHARE if seen.start < LIMIT_START else 0.0,
        "completions fill {now:.0%} of the {max_tokens} tokens allowed ({start:.0%} at the start): the policy no "
        "longer ends its answers; set rollout.missing_eos_penalty or shaping.length_penalty, or raise "
        "data.max_completion_tokens",
    ),
    "short": Rule(
        "objective/length",
        lambda seen: _fallen(seen, LENGTH_SHARE),
        "completions shrank from {start:.0f} to {now:.0f} tokens: the reward may pay for saying nothing; read "
        "samples.jsonl, lower shaping.length_penalty or rollout.missing_eos_penalty, raise kl.coef",
    ),
    "repetition": Rule(
        "val/repetition",
        lambda seen: (seen.now - seen.start) / REPETITION,
        "{now:.0%} of the 3-grams of an answer repeat earlier ones ({start:.0%} at the start): the policy loops, which "
        "the reward does not see (reward hacking); read samples.jsonl, raise kl.coef, set shaping.length_penalty",
    ),
    "disagreement": Rule(
        "objective/disagreement",
        lambda seen: _grown(seen, DISAGREEMENT),
        "the reward's members disagree by {now:.2f} ({start:.2f} at the start): the answers have left what the reward "
        "was trained on, so its score means little (over-optimisation); set combine: mean_minus_std in reward_from, "
        "raise kl.coef, or train the reward on answers of this policy",
    ),
    "entropy": Rule(
        "entropy",
        lambda seen: _fallen(seen, ENTROPY_SHARE),
        "the entropy per token fell from {start:.2f} to {now:.2f} nats: the policy has nearly stopped exploring (mode "
        "collapse); raise kl.coef or {stage}.entropy_coef, lower train.learning_rate or {stage}.inner_epochs",
    ),
    "noise": Rule(
        "entropy",
        lambda seen: _grown(seen, ENTROPY_GROWTH),
        "the entropy per token grew from {start:.2f} to {now:.2f} nats: the answers turn into noise; lower "
        "{stage}.entropy_coef or train.learning_rate, raise kl.coef",
    ),
    "distinct": Rule(
        "val/distinct_2",
        lambda seen: _fallen(seen, DISTINCT_SHARE),
        "distinct-2 of the answers fell from {start:.2f} to {now:.2f}: the policy says the same to every prompt (mode "
        "collapse); read samples.jsonl, raise kl.coef or {stage}.entropy_coef, lower train.learning_rate",
    ),
    "eos": Rule(
        "ended",
        lambda seen: (seen.start - seen.now) / _eos_drop(seen.completions),
        "{now:.0%} of the answers end by themselves ({start:.0%} at the start): the others are cut, and their score is "
        "that of half an answer; set rollout.missing_eos_penalty or raise data.max_completion_tokens",
    ),
    "clip": Rule(
        "policy/clipfrac_avg",
        lambda seen: seen.now / CLIP_FRACTION,
        "the clipped share of tokens is {now:.2f}: the updates are too large and most of each is thrown away; lower "
        "train.learning_rate or {stage}.inner_epochs, or set {stage}.target_kl_stop",
    ),
    "approxkl": Rule(
        "policy/approxkl_avg",
        lambda seen: seen.now / APPROX_KL,
        "an update moves the policy by {now:.2f} nats per token: far more than a trust region allows; set "
        "{stage}.target_kl_stop (0.02 is common), lower train.learning_rate or {stage}.inner_epochs",
    ),
    "ratio": Rule(
        "val/ratio",
        lambda seen: max(seen.now / RATIO, 1 / (RATIO * max(seen.now, 1e-9))),
        "π/π_old is {now:.3g} on average where it should be near 1: the updates are too drastic; lower "
        "train.learning_rate or set {stage}.target_kl_stop",
    ),
    "value": Rule(
        "val/explained_variance",
        lambda seen: seen.now / EXPLAINED_VARIANCE if _always_negative(seen.last) else 0.0,
        "the values explain {now:.2f} of the variance of the returns, less than a constant would: the advantages are "
        "noise; change value_model.learning_rate, start with value_model.init: reward, or widen ppo.value_clip_range",
    ),
    "groups": Rule(
        "frac_reward_zero_std",
        lambda seen: seen.now / ZERO_STD_SHARE,
        "in {now:.0%} of the groups every answer has the same reward, so these teach nothing: the prompts are "
        "too hard or too easy for this policy (see objective/scores), or the reward tells too little apart; choose "
        "other prompts, or raise grpo.group_size",
    ),
    "negative": Rule(
        "objective/kl",
        lambda seen: -seen.now / KL_NEGATIVE,
        "KL to the reference is {now:.1f} nats, which a true KL cannot be: what is sampled is not what is scored; use "
        "rollout.temperature 1, rollout.top_p 1 and rollout.top_k 0, and see what `lowrank-rlhf doctor` says",
    ),
}

NOT_FINITE = (
    "{names} is not a number: something has overflowed, and what follows learns nothing; go back to a checkpoint, "
    "lower train.learning_rate, and see that the reward gives finite scores (shaping.clip)"
)
KL_SEEN = (
    "KL to the reference is {now:.1f} nats per completion and rising ({start:.1f} at the start, budget {budget:g}) "
)
KL_WITH_SCORE = (
    "while the score rises from {before:.2f} to {after:.2f}: the policy may be exploiting the reward (reward hacking, "
    "over-optimisation), whose score then no longer means quality; read samples.jsonl, judge with something that did "
    "not train, raise kl.coef or set kl.target"
)
KL_WITHOUT_SCORE = (
    "while the score goes from {before:.2f} to {after:.2f}: the policy drifts and gains nothing by it; lower "
    "train.learning_rate, raise kl.coef or set kl.target"
)
