"""Held-out figures of a policy that learned from preferences, before and after."""

from lowrank_rlhf.runs import Run


def before_and_after(stage: str, run: Run, last: dict[str, float]) -> dict[str, float]:
    """The held-out figures of the finished policy, and those of step 0 where the two are compared; said."""
    first = run.metrics()[0]
    compared = ("eval_loss", "eval_accuracy")
    low, high = last["eval_accuracy_low"], last["eval_accuracy_high"]
    print(f"accuracy {last['eval_accuracy']:.3f} [{low:.3f}, {high:.3f}]")
    shown = (f"{name.removeprefix('eval_')} {first[name]:.4f} -> {last[name]:.4f}" for name in compared)
    print(f"{stage}: held out, before -> after: {', '.join(shown)}", flush=True)
    return {f"{name}_before": first[name] for name in compared} | last
