"""Does a PPO or GRPO run go wrong? Warnings in words, from the numbers that each iteration logs anyway.

Every figure is judged by its median over the last iterations, most of them against its median at the start, so that a
single bad batch says nothing. A warning comes once and again only after its cause was gone for several iterations.
"""

import copy
import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from lowrank_rlhf.stability_rules import KL_BUDGET, KL_SEEN, KL_WITH_SCORE, KL_WITHOUT_SCORE, NOT_FINITE, RULES, Seen

START = 3  # iterations whose median is "the start": before the policy has moved far, and one odd batch is outvoted
WINDOW = 5  # iterations whose median is "now": two odd batches are outvoted
FIRST = 3  # no judgement on fewer iterations than this
CALM = 0.9  # a cause is gone once its figure was below this share of the threshold for WINDOW iterations in a row
# Of pairs (earlier, later): with 5 against 5 the one-sided 5 % point of Mann and Whitney's test, with 3 against 3 10 %
RISES = 0.84

KL, SCORES = "objective/kl", "objective/scores"
FINITE = (KL, SCORES, "loss/policy_avg", "policy/approxkl_avg", "val/ratio")
JUDGED = {rule.figure for rule in RULES.values()} | {KL, SCORES}


class Watch:
    """Reads the metrics of every iteration and says in words what looks wrong.

    Args:
        completions: rollouts per iteration; how noisy a share of them is.
        max_tokens: the limit of a completion.
        kl_budget: nats per completion above the start that are taken without a warning.
        stage: ppo or grpo.

    >>> watch = Watch(completions=16, max_tokens=64)
    >>> [watch.update(step, {"policy/clipfrac_avg": 0.6}) for step in range(1, 4)][-1][0][:41]
    'the clipped share of tokens is 0.60: the '
    """

    def __init__(self, completions: int, max_tokens: int, kl_budget: float = KL_BUDGET, stage: str = "ppo"):
        self.completions, self.max_tokens, self.kl_budget, self.stage = completions, max_tokens, kl_budget, stage
        self.starts: dict[str, list[float]] = {}
        self.recent: dict[str, list[float]] = {}
        self.active: dict[str, int] = {}  # cause → iterations since it was last seen

    def update(self, step: int, row: Mapping[str, float]) -> list[str]:
        """The warnings that are new with the metrics `row` of iteration `step`.

        Row 0, which repeats the first rollout, is left out. A metric that a row does not have is not judged.
        """
        if step < 1:
            return []
        values = figures(row, self.completions, self.max_tokens)
        for name, value in values.items():
            if math.isfinite(value):
                start, recent = self.starts.setdefault(name, []), self.recent.setdefault(name, [])
                recent.append(float(value))
                del recent[: -2 * WINDOW]
                if len(start) < START:
                    start.append(float(value))
        found = {"finite": _finite(row)}
        for cause, rule in RULES.items():
            if rule.figure in values and len(self.recent.get(rule.figure, [])) >= FIRST:
                seen = self.see(rule.figure)
                found[cause] = (rule.badness(seen), rule.words.format(**vars(seen)))
        if KL in values and KL in self.recent:
            found["kl"] = self._kl()
        return [words for cause, (badness, words) in found.items() if self._is_new(cause, badness)]

    def see(self, figure: str) -> Seen:
        """A figure of which there is at least one finite value."""
        recent = self.recent[figure]
        return Seen(
            now=median(recent[-WINDOW:]),
            start=median(self.starts[figure]),
            last=recent,
            completions=self.completions,
            max_tokens=self.max_tokens,
            stage=self.stage,
        )

    def _is_new(self, cause: str, badness: float) -> bool:
        new = badness >= 1 and cause not in self.active
        if badness >= (CALM if cause in self.active else 1):
            self.active[cause] = 0
        elif cause in self.active:
            self.active[cause] += 1
            if self.active[cause] >= WINDOW:
                del self.active[cause]
        return new

    def _kl(self) -> tuple[float, str]:
        """KL above its budget and rising; once it was warned of, being above is enough to stay."""
        seen, scores = self.see(KL), self.recent.get(SCORES, [])
        badness = (seen.now - seen.start) / self.kl_budget
        if "kl" not in self.active and not rises(seen.last):
            badness = 0.0
        words = KL_SEEN + (KL_WITH_SCORE if rises(scores) else KL_WITHOUT_SCORE)
        before, after = (median(half or [math.nan]) for half in halves(scores))
        return badness, words.format(**vars(seen), budget=self.kl_budget, before=before, after=after)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and names, for a checkpoint: a resumed run warns of what the unbroken one would."""
        return copy.deepcopy({"starts": self.starts, "recent": self.recent, "active": self.active})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        state = copy.deepcopy(dict(state))
        self.starts, self.recent, self.active = state["starts"], state["recent"], state["active"]


def figures(row: Mapping[str, float], completions: int, max_tokens: int) -> dict[str, float]:
    """What is judged of a metrics row: metrics as they are, and three that are made of them.

    >>> figures({"objective/length": 20.0, "objective/entropy": 40.0, "val/num_eos_tokens": 12.0}, 16, 40)
    {'objective/length': 20.0, 'entropy': 2.0, 'ended': 0.75, 'length share': 0.5}
    """
    values = {name: row[name] for name in row if name in JUDGED}
    entropy, ended = entropy_per_token(row), ended_share(row, completions)
    if entropy is not None:
        values["entropy"] = entropy
    if ended is not None:
        values["ended"] = ended
    if "objective/length" in row:
        values["length share"] = row["objective/length"] / max_tokens
    return values


def entropy_per_token(row: Mapping[str, float]) -> float | None:
    """Nats: the entropy summed over a completion by its length, each a mean over the batch; None without them.

    >>> entropy_per_token({"objective/entropy": 90.0, "objective/length": 30.0})
    3.0
    """
    if "objective/entropy" not in row or "objective/length" not in row:
        return None
    return row["objective/entropy"] / max(1.0, row["objective/length"])


def ended_share(row: Mapping[str, float], completions: int | None = None) -> float | None:
    """Share of completions that ended before the token limit; None where the row does not say.

    >>> ended_share({"val/eos_rate": 0.5}), ended_share({"val/num_eos_tokens": 4.0}, completions=16)
    (0.5, 0.25)
    """
    if "val/eos_rate" in row:
        return row["val/eos_rate"]
    if completions and "val/num_eos_tokens" in row:
        return row["val/num_eos_tokens"] / completions
    return None


def rises(values: list[float]) -> bool:
    """Whether the later half is above the earlier one, by Mann and Whitney's U; never for fewer than 6 values.

    >>> rises([1, 2, 1, 2, 1, 3, 4, 3, 4, 3]), rises([1, 2, 1, 2, 1, 2, 1, 2, 1, 2])
    (True, False)
    """
    early, late = halves(values)
    return len(early) >= FIRST and sum(a < b for a in early for b in late) >= RISES * len(early) ** 2


def halves(values: list[float]) -> tuple[list[float], list[float]]:
    """
    >>> halves([1, 2, 3, 4, 5])
    ([1, 2], [4, 5])
    """
    half = len(values) // 2
    return values[:half], values[len(values) - half :]


def _finite(row: Mapping[str, float]) -> tuple[float, str]:
    broken = [name for name in FINITE if name in row and not math.isfinite(row[name])]
    return float(bool(broken)), NOT_FINITE.format(names=" and ".join(broken))
