"""Options that would silently break "one base, many adapters", refused by name with the reason."""

from typing import Any, NoReturn

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from lowrank_rlhf.errors import UserError

# Initialisations that subtract something from, or re-quantise, the base weights that all roles share.
BASE_REWRITING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
SAFE_INITS = (True, False, "gaussian")


def refuse_unsafe(config: Any, where: str) -> None:
    """Raise unless `config` is a LoRA that leaves the base as it is.

    Args:
        config: a PEFT config.
        where: a role or folder, for the message.

    Raises:
        UserError: names the option and why it cannot work here.
    """
    if not isinstance(config, LoraConfig):
        raise UserError(f"{where}: adapter type {config.peft_type} is not supported, only LoRA is")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(BASE_REWRITING_INITS):
        raise UserError(
            f"{where}: init_lora_weights={init!r} rewrites the base weights, which every other role shares; "
            "use the default initialisation"
        )
    if init not in SAFE_INITS:
        raise UserError(
            f"{where}: init_lora_weights={init!r} is not known to work on a 4-bit base (orthogonal casts the adapter "
            "to the packed weights' integer type); use the default initialisation"
        )
    if config.modules_to_save or config.trainable_token_indices:
        raise UserError(
            f"{where}: modules_to_save and trainable_token_indices put full copies of base modules into one role "
            "and break with several adapters; heads live outside PEFT here"
        )
    if config.bias != "none":
        raise UserError(f"{where}: bias={config.bias!r} trains biases of the shared base; use bias='none'")
    targets = config.target_modules
    if targets and not isinstance(targets, str) and any("lm_head" in name for name in targets):
        raise_lm_head(where)


def refuse_wrapped_lm_head(model: nn.Module, where: str) -> None:
    """The same refusal for target patterns that only turn out to match lm_head once they are applied."""
    if isinstance(model.get_output_embeddings(), LoraLayer):  # type: ignore[operator]
        raise_lm_head(where)


def raise_lm_head(where: str) -> NoReturn:
    raise UserError(
        f"{where}: LoRA on lm_head is refused: log-probabilities are computed from lm_head's weight in vocabulary "
        "chunks, which would leave the adapter out; drop lm_head from lora.target_modules"
    )


def copy_config(config: LoraConfig) -> LoraConfig:
    """The options of a LoRA without the name of a base: PEFT puts in its own, and warns where the two differ."""
    return LoraConfig(**{**config.to_dict(), "peft_type": None, "base_model_name_or_path": None})


def forbid_merging(model: nn.Module) -> None:
    """Make every LoRA layer on a 4-bit weight refuse to merge, whoever asks (PEFT's merge_and_unload included)."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and hasattr(module.get_base_layer().weight, "quant_state"):
            module.merge = _refuse_merge  # type: ignore[method-assign]


def _refuse_merge(*args: Any, **kwargs: Any) -> NoReturn:
    raise UserError(
        "merging a LoRA into the 4-bit base is refused: re-quantising loses nearly all of the change (cosine 0.03 "
        "measured) and drifts the base for every role; export instead: load the base in 16 bit and merge there"
    )
