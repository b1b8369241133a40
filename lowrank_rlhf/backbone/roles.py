"""One base model, any number of roles: who is on in a forward, who learns, and how roles are copied.

Every switch goes through `use`, `reference` and `mixed`, which restore what they found also when their body raises.
Backward belongs inside the `with` that selected the role; gradient checkpointing re-enters the role of its forward.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from lowrank_rlhf.backbone.attention import use_short_attention
from lowrank_rlhf.backbone.base import check_logit_path, load_base
from lowrank_rlhf.backbone.guard import copy_config, forbid_merging, refuse_unsafe, refuse_wrapped_lm_head
from lowrank_rlhf.backbone.heads import Pooling, ScalarHead
from lowrank_rlhf.backbone.linear import blocked, settled, use_lean_layers
from lowrank_rlhf.backbone.lm_head import multiply_fast
from lowrank_rlhf.backbone.passes import Passes
from lowrank_rlhf.backbone.rows import BASE_ROW, rows_named
from lowrank_rlhf.backbone.switch import Switch
from lowrank_rlhf.config import Base, Lora
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.out_of_memory import MostRows


class Backbone(Passes):
    """The base model in memory once, its adapters by role name, and an fp32 head for each role that has one.

    Args:
        base: what to load.
        dtype: of what is not 4-bit; None picks what the device computes best.

    Attributes:
        model: the causal language model itself, with every adapter's layers injected.
        tokenizer: its tokenizer.
        info: what identifies the base.
        heads: role → `ScalarHead`.
        most_rows: what was found to fit into memory.
        reference_role: the role that is the KL and preference reference; None is the base with all adapters off.
    """

    def __init__(self, base: Base, dtype: torch.dtype | None = None):
        self.model, self.tokenizer, self.info = load_base(base, dtype)
        if self.info.fast_products:
            use_short_attention(self.model)
            multiply_fast(self.model)
        check_logit_path(self.model)
        self.heads = nn.ModuleDict()
        self.most_rows = MostRows()
        self.reference_role: str | None = None
        self.peft: PeftModel | None = None  # PEFT cannot wrap a model with no adapter, so it comes with the first role
        self._switch = Switch(self.model, None)
        self._active: str | None = None
        self._trainable: frozenset[str] = frozenset()

    # Roles

    @property
    def roles(self) -> list[str]:
        return list(self.peft.peft_config) if self.peft is not None else []

    @property
    def active(self) -> str | None:
        """The role that the next forward uses; None is the bare base."""
        return self._active

    @property
    def context(self) -> int | None:
        """Tokens the base can attend to; None where that has no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def add_role(self, role: str, lora: Lora, *, head: bool = False) -> None:
        """A new adapter that changes nothing yet (B = 0), with a zero head if asked for.

        Raises:
            UserError: the role exists, or the adapter's options would touch the shared base.
        """
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            use_rslora=lora.rslora,
            task_type="CAUSAL_LM",
        )
        self.add_adapter(role, config)
        if head:
            self.add_head(role)

    def add_adapter(self, role: str, config: LoraConfig) -> None:
        """The same from a PEFT config; the new role is frozen until `train_only` names it."""
        if role in self.roles:
            raise UserError(f"role {role!r} is already on this base")
        refuse_unsafe(config, f"role {role!r}")
        config = copy_config(config)
        try:
            if self.peft is None:
                self.peft = get_peft_model(self.model, config, adapter_name=role)
            else:
                self.peft.add_adapter(role, config)
        except ValueError as error:
            raise UserError(f"lora.target_modules: {str(error).splitlines()[0]}") from error
        refuse_wrapped_lm_head(self.model, f"role {role!r}")
        forbid_merging(self.model)
        use_lean_layers(self.model)
        self.model.train(self.model.training)  # a new adapter's dropout would be in train mode in an eval-mode model
        self._find_layers()

    def add_head(self, role: str, pooling: Pooling = "last") -> None:
        hidden_size = self.model.config.get_text_config().hidden_size
        self.heads[role] = ScalarHead(hidden_size, pooling).to(self.model.device)
        self._apply_requires_grad()

    def drop_head(self, role: str) -> None:
        """Take a role's head away, where it has one."""
        if role in self.heads:
            del self.heads[role]

    def drop_role(self, role: str) -> None:
        """Take a role's adapter and head away; nothing of them stays in memory, and the other roles are untouched.

        Raises:
            UserError: no such role, or it is on, or it is the reference.
        """
        self._require(role)
        if role in (self._active, self.reference_role):
            raise UserError(f"role {role!r} is {'on' if role == self._active else 'the reference'}, so it stays")
        assert self.peft is not None
        self.drop_head(role)
        self._trainable -= {role}
        before = self._active
        # Also with adapters off PEFT points at one of them, and would warn that it picks the next
        self._select(next((other for other in self.roles if other != role), None))
        self.peft.delete_adapter(role)
        self._select(before)
        self._find_layers()

    def copy_role(self, source: str, target: str) -> None:
        """`target` becomes a new role with exactly `source`'s adapter and head."""
        self._require(source)
        assert self.peft is not None
        self.add_adapter(target, cast(LoraConfig, self.peft.peft_config[source]))
        self.copy_weights(source, target)
        if source in self.heads:
            self.copy_head(source, target)

    @torch.no_grad()
    def copy_weights(self, source: str, target: str) -> None:
        """An existing role's adapter becomes that of another, of the same shape."""
        for ours, theirs in zip(self._switch.parameters(target), self._switch.parameters(source), strict=True):
            ours.copy_(theirs)

    def without_dropout(self, *roles: str) -> None:
        """Turn the adapter dropout of these roles off for good: policy ratios compare log-probs of the same tokens."""
        for layer in self._switch.layers:
            for role in roles:
                if role in layer.lora_dropout:
                    layer.lora_dropout[role] = nn.Identity()

    def copy_head(self, source: str, target: str) -> None:
        self.add_head(target, cast(ScalarHead, self.heads[source]).pooling)
        self.heads[target].load_state_dict(self.heads[source].state_dict())

    def train_only(self, *roles: str) -> None:
        """These roles learn, all others and the base are frozen, whichever role is on."""
        for role in roles:
            self._require(role)
        self._trainable = frozenset(roles)
        self._apply_requires_grad()

    def parameters(self, role: str) -> list[nn.Parameter]:
        """Everything a role consists of: its LoRA weights, then its head."""
        self._require(role)
        return self._switch.parameters(role) + (list(self.heads[role].parameters()) if role in self.heads else [])

    def megabytes(self, role: str) -> float:
        """What a role adds to the base in memory: its adapter and its head, in 10^6 bytes."""
        return sum(parameter.nbytes for parameter in self.parameters(role)) / 1e6

    # Modes

    @contextmanager
    def use(self, role: str | None, *, train: bool = False) -> Iterator[PreTrainedModel]:
        """`role` alone is on inside the block; None is the bare base, every adapter off.

        Args:
            role: an existing role or None.
            train: put the model in train mode, which turns dropout and gradient checkpointing on; else eval mode.

        Raises:
            UserError: no such role.
        """
        if role is not None:
            self._require(role)
        before, was_training = self._active, self.model.training
        self._select(role)
        self._train_mode(train)
        try:
            yield self.model
        finally:
            self._train_mode(was_training)
            self._select(before)

    @contextmanager
    def generating(self, role: str | None) -> Iterator[PreTrainedModel]:
        """`use(role)` for many short forwards: its weights stand ready in 16 bit where that fits; none may change."""
        with self.unpacked(), self.use(role) as model, blocked(model), settled(model, role):
            yield model

    def reference(self) -> AbstractContextManager[PreTrainedModel]:
        """The frozen reference: the bare base, or the frozen copy of where the policy started."""
        return self.use(self.reference_role)

    @contextmanager
    def mixed(self, rows: Sequence[str | None]) -> Iterator[PreTrainedModel]:
        """Row i of every batch in the block goes through role `rows[i]`; None is the bare base. Inference only.

        Equal to separate passes at the same padded shape. With beams or several return sequences per input, give one
        role per input. PEFT's own `adapter_names` argument leaves its hooks on the model when a forward raises; these
        are removed whatever happens.

        Raises:
            UserError: an unknown role, or one with DoRA, which cannot be applied per row.
        """
        for role in dict.fromkeys(rows):
            if role is None:
                continue
            self._require(role)
            if self.peft is not None and getattr(self.peft.peft_config[role], "use_dora", False):
                raise UserError(f"role {role!r} uses DoRA, which cannot share a mixed batch; use `use({role!r})`")
        names = [BASE_ROW if role is None else role for role in rows]
        # With adapters disabled PEFT ignores the names, so any one role is switched on underneath.
        with self.use(self.roles[0] if self.roles else None) as model, rows_named(model, names):
            yield model

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in backward, each layer under the role of its own forward.

        Without that, a backward after another role was selected would recompute with the wrong adapter and drop or
        falsify gradients in silence.
        """
        settings = {"use_reentrant": False, "context_fn": self._recompute_contexts}
        if hasattr(self.model, "activation_checkpointing_enable"):  # transformers ≥ 5.23
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
        else:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)

    # Internals

    def _require(self, role: str) -> None:
        if role not in self.roles:
            raise UserError(f"no role {role!r} on this base; there are: {', '.join(self.roles) or 'none'}")

    def _find_layers(self) -> None:
        """After PEFT has added or removed adapters, which switches one on and lets it learn."""
        self._switch = Switch(self.model, self.peft)
        for layer in self._switch.layers:
            layer.requires_grad_(False)
        self._select(self._active)
        self._apply_requires_grad()

    def _select(self, role: str | None) -> None:
        self._switch.select(role)
        self._active = role

    def _apply_requires_grad(self) -> None:
        for role in self.roles:
            for parameter in self.parameters(role):
                parameter.requires_grad_(role in self._trainable)

    def _train_mode(self, train: bool) -> None:
        if self.model.training != train:
            self._switch.train(train)

    def _recompute_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), self._reenter(self._active)

    @contextmanager
    def _reenter(self, role: str | None) -> Iterator[None]:
        before = self._active
        if before == role:
            yield
            return
        self._select(role)
        try:
            yield
        finally:
            self._select(before)
