"""A plan as a person reads it."""

from lowrank_rlhf.plan.predict import GIB, Plan
from lowrank_rlhf.plan.rehearsal import LABELS

OTHERS = {
    "cpu": "for Python, its libraries, and freed memory that is kept in pieces",
    "cuda": "for the CUDA context, kernels and fragments (an estimate)",
}


def table(plan: Plan) -> str:
    """GiB of each component, a column a phase, at the moment when the phase takes the most."""
    width = max(len(label) for label in LABELS)
    lines = ["".join([f"{'GiB':<{width}}", *(f"{phase:>10}" for phase in plan.phases)])]
    for label in LABELS:
        values = [parts[label] for parts in plan.phases.values()]
        if any(values):
            lines.append("".join([f"{label:<{width}}", *(f"{value / GIB:10.2f}" for value in values)]))
    totals = [f"{parts.total() / GIB:10.2f}" for parts in plan.phases.values()]
    lines.append("".join([f"{'all tensors':<{width}}", *totals]))
    return "\n".join(lines)


def peak_line(plan: Plan) -> str:
    """
    >>> from collections import Counter
    >>> peak_line(Plan({"update": Counter(base=2**30)}, "cuda"))
    'peak: 2.50 GiB, in update: 1.00 of tensors, 1.50 for the CUDA context, kernels and fragments (an estimate)'
    """
    others = f"{(plan.peak - plan.tensors) / GIB:.2f} {OTHERS[plan.device]}"
    return f"peak: {plan.peak / GIB:.2f} GiB, in {plan.peak_phase}: {plan.tensors / GIB:.2f} of tensors, {others}"
