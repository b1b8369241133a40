"""Where a policy starts, and the reference that it is kept close to: shared by every stage that trains `policy`."""

from lowrank_rlhf.adapters import answering_role
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import Lora
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.runs import load_run_role

POLICY = "policy"
REFERENCE = "start"  # the frozen adapter of the reference, where it is not the base


def refuse_dropout(lora: Lora) -> None:
    """
    Raises:
        UserError: the recipe asks for adapter dropout.
    """
    if lora.dropout:
        raise UserError("lora.dropout: log-probs of a policy are compared with each other and need 0; drop the key")


def start_policy(backbone: Backbone, lora: Lora, policy_from: str | None, *, keep_start: bool = True) -> None:
    """Add `policy`, at zero or as a copy of the adapter of the run `policy_from`; its adapter dropout is off.

    Args:
        keep_start: leave the adapter it was copied from beside it, frozen, as `start`.
    """
    if policy_from is None:
        backbone.add_role(POLICY, lora)
    else:
        loaded = REFERENCE if keep_start else POLICY
        load_run_role(backbone, policy_from, answering_role(policy_from) or "sft", loaded, key="policy_from")
        backbone.drop_head(loaded)  # of a policy that shared its trunk with its value
        if keep_start:
            backbone.copy_role(REFERENCE, POLICY)
    backbone.without_dropout(POLICY)


def choose_reference(backbone: Backbone, reference: str, stage: str) -> None:
    """`reference: auto | base | start` as a role: the frozen `start` where there is one, unless the base is asked for.

    Args:
        stage: its name, for the message where `start` is the base itself.
    """
    has_start = REFERENCE in backbone.roles
    if reference == "start" and not has_start:
        print(f"{stage}: reference: start is the base itself here, the policy starts at zero", flush=True)
    backbone.reference_role = REFERENCE if has_start and reference != "base" else None


def check_start(backbone: Backbone, stage: str, what: str, value: float, unit: str = "") -> None:
    """`value` is 0 before any update, unless the recipe asked for a reference that the policy does not start from.

    Args:
        what: what is 0 where the policy is its reference, for the message.

    Raises:
        RuntimeError: it is not 0, so the reference is not what the policy started from.
    """
    if REFERENCE in backbone.roles and backbone.reference_role is None:
        print(f"{stage}: reference: base after SFT, so {what} starts at {value:.2f}{unit}, not 0", flush=True)
    elif abs(value) > 1e-3:
        raise RuntimeError(f"{what} to the reference is {value}{unit} before any update, expected 0")
