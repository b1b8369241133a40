"""A backbone of tensors that have sizes and types but no content: what the real code would allocate can be counted.

Made from a model's config alone, in milliseconds, whatever its size. Roles are added to it as to the real one; then, in
torch's FakeTensorMode, every weight gets its place and the real forwards and backwards run.
"""

import copy
from typing import Any, cast

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from lowrank_rlhf.backbone import shapes, tiny
from lowrank_rlhf.backbone.attention import use_short_attention
from lowrank_rlhf.backbone.base import BaseInfo, resolve_source
from lowrank_rlhf.backbone.roles import Backbone
from lowrank_rlhf.backbone.switch import Switch
from lowrank_rlhf.config import Base, Lora
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.out_of_memory import MostRows

BLOCK, NESTED_BLOCK = 64, 256  # values that share a scale, and scales that share one, in bitsandbytes' NF4


class Blueprint(Backbone):
    """
    Args:
        config: of the model.
        dtype: of what is not 4-bit.
        quantize: linear layers are NF4.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype, *, quantize: bool):
        self.dtype = dtype
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            if quantize:
                for layer in shapes.replace_linears(self.model, dtype):
                    layer.support_avx512bf16_for_cpu = False
        self.model.requires_grad_(False)
        self.model.eval()
        self.heads, self.most_rows = nn.ModuleDict(), MostRows()
        self.reference_role, self.peft = None, None
        self.info = _info(on_cpu=dtype == torch.float32, quantized=quantize)
        if self.info.fast_products:
            use_short_attention(self.model)
        self._switch = Switch(self.model, None)
        self._active, self._trainable = None, frozenset()

    def add_role(self, role: str, lora: Lora, *, head: bool = False) -> None:
        with torch.device("meta"):
            super().add_role(role, lora, head=head)

    def place_base(self) -> None:
        """Give the base's weights, packed ones with their scales, their places. Inside a FakeTensorMode."""
        self._place({id(parameter) for role in self.roles for parameter in self.parameters(role)})

    def place_roles(self) -> None:
        """The same for adapters and heads; no role can be added after."""
        self._place(set())

    def _place(self, left_out: set[int]) -> None:
        made: dict[int, nn.Parameter] = {}  # a tied weight is one
        tables = torch.empty(16), torch.empty(256)
        for module in [*self.model.modules(), *self.heads.modules()]:
            for key, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.is_meta and id(parameter) not in left_out:
                    packed = isinstance(module, bnb.nn.Linear4bit) and key == "weight"
                    if id(parameter) not in made:
                        made[id(parameter)] = _packed(parameter, self.dtype, *tables) if packed else _like(parameter)
                    module._parameters[key] = made[id(parameter)]
            for key, buffer in list(module._buffers.items()):
                if buffer is not None and buffer.is_meta:
                    module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)


def base_config(base: Base) -> PretrainedConfig:
    """The config of `base.model`: without a file for the embedded model and the shipped recipes' bases, else
    transformers' own, from a folder, the hub's cache or the hub.

    Raises:
        UserError: none is found.
    """
    if base.model == tiny.MODEL_ID:
        return tiny.tiny_model().config
    if base.model.startswith(shapes.PREFIX):
        return shapes.shape_config(base.model.removeprefix(shapes.PREFIX))
    if base.model in shapes.MODELS:
        return shapes.shape_config(shapes.MODELS[base.model])
    source, revision = resolve_source(base)
    reason = ""
    for kept in (True, False):  # what is here already needs no network, nor its timeouts
        try:
            return cast(PretrainedConfig, AutoConfig.from_pretrained(source, local_files_only=kept, **revision))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
    raise UserError(
        f"base.model: the config of {base.model!r} is neither here nor can it be fetched ({reason}); give a folder "
        f"with its config.json, be online once, or plan for a base like it, of: {', '.join(shapes.MODELS)}"
    )


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same with only its first layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    for name in ("layer_types", "no_rope_layers"):
        if getattr(text, name, None):
            setattr(text, name, getattr(text, name)[:layers])
    return config


def is_uniform(config: PretrainedConfig) -> bool:
    """Whether every layer has the same modules and sizes, so that two layers say what many take."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    layers = getattr(model.base_model, "layers", None)
    if layers is None or len(layers) != config.get_text_config().num_hidden_layers:
        return False
    return len({tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()) for layer in layers}) == 1


def unpacked_bytes(model: nn.Module) -> int:
    """What the 4-bit weights take in 16 bit."""
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    return sum(2 * layer.in_features * layer.out_features for layer in layers)


def _info(*, on_cpu: bool, quantized: bool) -> BaseInfo:
    """Of what forwards ask of it; the rest is nobody's."""
    device, quantization = "cpu" if on_cpu else "cuda", "nf4" if quantized else "none"
    return BaseInfo("", None, quantization, "", device, "", "", pad_token_id=0, eos_token_id=0)


def _like(parameter: nn.Parameter) -> nn.Parameter:
    made = torch.empty(parameter.shape, dtype=parameter.dtype)
    return nn.Parameter(made, requires_grad=parameter.requires_grad)


def _packed(parameter: nn.Parameter, dtype: torch.dtype, code: Tensor, nested_code: Tensor) -> nn.Parameter:
    """Two values a byte, a byte a block for its scale, fp32 for the scales of these; Dettmers et al. 2023,
    arXiv:2305.14314, section 3. A plain parameter: bitsandbytes' own class cannot hold a fake tensor."""
    blocks = -(-parameter.numel() // BLOCK)
    nested = QuantState(
        absmax=torch.empty(-(-blocks // NESTED_BLOCK)),
        blocksize=NESTED_BLOCK,
        code=nested_code,
        dtype=torch.float32,
    )
    made: Any = nn.Parameter(torch.empty(-(-parameter.numel() // 2), 1, dtype=torch.uint8), requires_grad=False)
    made.quant_state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        shape=parameter.shape,
        code=code,
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()),
        state2=nested,
    )
    made.bnb_quantized, made.quant_type, made.compress_statistics = True, "nf4", True
    return cast(nn.Parameter, made)
