"""The passes of a recipe, rehearsed on a base without content, with the books open."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import pad
from transformers import DynamicCache, PretrainedConfig

from lowrank_rlhf import memory
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.backbone.blueprint import Blueprint, unpacked_bytes
from lowrank_rlhf.config import Lora, Rollout
from lowrank_rlhf.logps import VOCAB_CHUNK
from lowrank_rlhf.out_of_memory import MostRows
from lowrank_rlhf.plan.demand import Demand, Pass
from lowrank_rlhf.plan.ledger import Ledger
from lowrank_rlhf.rollout import sampling_warpers, state_argument

BASE, ROLES, OPTIMIZER, GRADIENTS = "base", "adapters, heads", "optimizer", "gradients"
ACTIVATIONS, LOGITS, CACHE, UNPACKED, REST = "activations", "logits", "KV cache", "16-bit weights", "temporary"
LABELS = (BASE, ROLES, OPTIMIZER, GRADIENTS, UNPACKED, ACTIVATIONS, LOGITS, CACHE, REST)

Moments = list[Counter[str]]  # what is in memory, by label, when a part of a pass takes the most


class Rehearsal:
    """
    Args:
        backbone: with the roles of the demand; without content, or a real one.
        ledger: that knows all of it.
        rollout: how tokens are drawn.
    """

    def __init__(self, backbone: Backbone, demand: Demand, ledger: Ledger, rollout: Rollout):
        self.backbone, self.demand, self.ledger, self.rollout = backbone, demand, ledger, rollout
        self.fake: AbstractContextManager[Any] = nullcontext()
        self.parts: Moments = []
        backbone.most_rows = MostRows("plan")  # with what a stage's puts aside
        backbone.train_only(*demand.learning)

    @classmethod
    def without_content(
        cls, config: PretrainedConfig, demand: Demand, lora: Lora, rollout: Rollout, **how: Any
    ) -> "Rehearsal":
        """
        Args:
            config: of the base, with as many layers as are to be rehearsed.
            how: of a Blueprint.
        """
        backbone = Blueprint(config, **how)
        for role, head in demand.roles.items():
            backbone.add_role(role, lora, head=head)
        made = cls(backbone, demand, Ledger(chosen=0), rollout)
        made.fake = FakeTensorMode()
        with made.fake, made.ledger:
            with made.ledger.label(BASE):
                backbone.place_base()
            with made.ledger.label(ROLES):
                backbone.place_roles()
        return made

    def standing(self) -> Counter[str]:
        """What is there from the second step on; and what the weights unpacked would take, which is not."""
        state = 2 * sum(parameter.nbytes for parameter in self._learned(*self.demand.learning))
        return self.ledger.live + Counter({OPTIMIZER: state, UNPACKED: unpacked_bytes(self.backbone.model)})

    def moments(self, *, unpack: bool) -> list[Moments]:
        """Of each pass of the demand.

        Args:
            unpack: the weights find room to be unpacked.
        """
        with self.fake, self.ledger, memory.suppose_free(sys.maxsize if unpack else 0):
            with self.ledger.label(OPTIMIZER):
                state = [torch.empty_like(p) for p in self._learned(*self.demand.learning) for _ in range(2)]
            found = [self._rehearse(each) for each in self.demand.passes]
            del state
        return found

    def _rehearse(self, each: Pass) -> Moments:
        self.parts = []
        if self.ledger.chosen is not None:
            self.ledger.chosen = each.rows * each.new
        with ExitStack() as stack:
            if each.unpacked:
                stack.enter_context(self.ledger.label(UNPACKED))
                stack.enter_context(self.backbone.unpacked())
            stack.enter_context(self.ledger.label(REST))
            self.ledger.restart()
            {"learn": self._learn, "read": self._read, "generate": self._generate}[each.kind](each)
            self._end_part()
        return self.parts

    def _end_part(self) -> None:
        self.parts.append(self.ledger.peak)
        self.ledger.restart()

    def _learned(self, *roles: str) -> list[nn.Parameter]:
        return [parameter for role in roles for parameter in self.backbone.parameters(role)]

    def _learn(self, each: Pass) -> None:
        """A micro-batch, as the stages learn from it, and the step."""
        assert each.role is not None
        learned = self._learned(each.role)
        handles = [p.register_post_accumulate_grad_hook(self._is_gradient) for p in learned]
        if each.adds:
            with self.ledger.label(GRADIENTS):
                for parameter in learned:
                    parameter.grad = torch.zeros_like(parameter)

        def work() -> None:
            with self.backbone.use(each.role, train=True), self._parts_of_backward():
                with self.ledger.label(ACTIVATIONS):
                    loss = torch.stack([output.float().sum() for output in self._outputs(each)]).sum()
                with self.ledger.label(LOGITS):
                    loss.backward()

        self.backbone.learn(each.rows, work)
        self._end_part()
        with self.ledger.label(OPTIMIZER):
            root = [torch.empty_like(parameter) for parameter in learned]  # of the second moments, all at once
        del root
        for handle, parameter in zip(handles, learned, strict=True):
            handle.remove()
            parameter.grad = None

    def _is_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.ledger.relabel(parameter.grad, GRADIENTS)

    @contextmanager
    def _parts_of_backward(self) -> Iterator[None]:
        """Three parts: until the last layer's backward is done, in the middle, and the first layer's. Between them what
        is in memory goes up or down by the same amount with every layer, so that the most is in the first or last."""
        layers = getattr(self.backbone.model.base_model, "layers", [])
        ends = {0, len(layers) - 2} if len(layers) > 1 else set()

        def hear(module: Any, inputs: Any, output: Any) -> None:
            states = output if isinstance(output, Tensor) else output[0]
            if states.requires_grad:
                states.register_hook(lambda gradient: self._end_part())

        handles = [layers[i].register_forward_hook(hear) for i in ends]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _outputs(self, each: Pass) -> tuple[Tensor, ...]:
        """What the losses are made of."""
        backbone = self.backbone
        ids, mask, completion = _rows(each)
        if each.reads == "score":
            return (backbone.scores(str(each.role), ids, mask),)
        if each.reads == "values":
            return (backbone.values(str(each.role), ids, mask, completion),)
        if each.packed:
            ids, completion = ids.view(1, -1), completion.view(1, -1)
            hidden = backbone.hidden(ids, None, torch.arange(each.prompt + each.new).repeat(each.rows)[None])
        else:
            hidden = backbone.hidden(ids, mask)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self.ledger.from_now(REST))
        with self.ledger.label(LOGITS), self._short_vocabulary():
            logps, entropy, _ = backbone.completion_logps(hidden, ids, completion)
        values = (backbone.heads[str(each.role)](hidden[completion]),) if each.reads == "both" else ()
        return (logps, *((entropy,) if each.entropy else ()), *values)

    @contextmanager
    def _short_vocabulary(self) -> Iterator[None]:
        """Of lm_head only the first chunks, in the place where they are: each takes what the first two take."""
        head: Any = self.backbone.model.get_output_embeddings()
        whole = head.weight
        head._parameters["weight"] = nn.Parameter(whole[: 2 * VOCAB_CHUNK], requires_grad=False)
        try:
            yield
        finally:
            head._parameters["weight"] = whole

    @torch.no_grad()
    def _read(self, each: Pass) -> None:
        with self.backbone.use(each.role):
            self._outputs(each)

    @torch.no_grad()
    def _generate(self, each: Pass) -> None:
        """The prompts are read, and the last token is drawn."""
        with self.backbone.use(each.role) as model:
            self._token(model, torch.zeros(each.rows, each.prompt, dtype=torch.long), _Cache(self.ledger, model.config))
            self._end_part()
            state = _Cache(self.ledger, model.config)
            before = each.prompt + each.new - 2
            if before > 0:
                self._token(model, torch.zeros(each.rows, before, dtype=torch.long), state)
            self.ledger.restart()
            self._token(model, torch.zeros(each.rows, 1, dtype=torch.long), state, before + 1)

    def _token(self, model: Any, ids: Tensor, state: Any, read: int | None = None) -> None:
        rows, columns = ids.shape
        output = model(
            input_ids=ids,
            attention_mask=torch.ones(rows, read or columns, dtype=torch.long),
            position_ids=torch.zeros(rows, columns, dtype=torch.long),
            use_cache=True,
            logits_to_keep=1,
            **{state_argument(model): state},
        )
        with self.ledger.label(LOGITS):
            logits = output.logits[:, -1].float()
            for warp in sampling_warpers(self.rollout):
                logits = warp(None, logits)
            pad(logits.softmax(dim=-1), (0, 1))  # as `draw` cuts it into blocks


class _Cache(DynamicCache):
    """Its keys and values are known to the ledger."""

    def __init__(self, ledger: Ledger, config: PretrainedConfig):
        super().__init__(config=config)
        self.ledger = ledger

    def update(self, *args: Any, **kwargs: Any) -> Any:
        states = super().update(*args, **kwargs)
        for state in states:
            self.ledger.relabel(state, CACHE)
        return states


def _rows(each: Pass) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and completion mask, shape (B, T); one row has padding, as nearly all batches do."""
    shape = (each.rows, each.prompt + each.new)
    ids, mask, completion = torch.zeros(shape, dtype=torch.long), *(torch.ones(shape, dtype=torch.bool) for _ in "12")
    mask[0, 0] = False
    completion[:, : each.prompt] = False
    return ids, mask, completion
