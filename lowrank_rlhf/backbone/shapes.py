"""The architectures of well-known open models, without weights: to measure speed and memory offline.

`base.model=random/NAME` is such an architecture with random 4-bit weights: it says nothing sensible, and takes the
memory and time of the real one. The sizes give the published numbers of parameters (tested); constants of norms and
positions, which change neither memory nor time, are not compared with the models' files.
"""

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lowrank_rlhf.errors import UserError

PREFIX = "random/"

LLAMA: dict[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
LLAMA |= {"vocab_size": 128256, "max_position_embeddings": 131072, "num_key_value_heads": 8}
QWEN: dict[str, Any] = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "vocab_size": 151936}
QWEN |= {"max_position_embeddings": 32768, "num_key_value_heads": 2, "tie_word_embeddings": True}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


SMOLLM2: dict[str, Any] = {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
SMOLLM3: dict[str, Any] = {"num_key_value_heads": 4, "tie_word_embeddings": True, "max_position_embeddings": 65536}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {**LLAMA, **_sizes(576, 1536, 30, 9), **SMOLLM2, "max_position_embeddings": 8192},
    "qwen2.5-0.5b": {**QWEN, **_sizes(896, 4864, 24, 14)},
    "llama-3.2-1b": {**LLAMA, **_sizes(2048, 8192, 16, 32), "tie_word_embeddings": True},
    "qwen2.5-1.5b": {**QWEN, **_sizes(1536, 8960, 28, 12)},
    "qwen2.5-3b": {**QWEN, **_sizes(2048, 11008, 36, 16)},
    "smollm3-3b": {**LLAMA, **_sizes(2048, 11008, 36, 16), **SMOLLM3, "model_type": "smollm3", "rms_norm_eps": 1e-6},
    "llama-3.1-8b": {**LLAMA, **_sizes(4096, 14336, 32, 32), "tie_word_embeddings": False},
}

# Which of them a model has: the embedded one and those of the recipes
MODELS = {
    "smollm2-135m-instruct": "smollm2-135m",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2.5-0.5b",
    "Qwen/Qwen2.5-1.5B-Instruct": "qwen2.5-1.5b",
    "Qwen/Qwen2.5-3B-Instruct": "qwen2.5-3b",
    "meta-llama/Llama-3.2-1B": "llama-3.2-1b",
    "HuggingFaceTB/SmolLM3-3B-Base": "smollm3-3b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
}


def shape_config(name: str) -> PretrainedConfig:
    """The transformers config of one of `SHAPES`.

    Raises:
        UserError: no such shape.
    """
    if name not in SHAPES:
        raise UserError(f"base.model: no shape {name!r}; there are: {', '.join(SHAPES)}")
    values = dict(SHAPES[name])
    return AutoConfig.for_model(values.pop("model_type"), bos_token_id=0, eos_token_id=0, pad_token_id=0, **values)


def random_model(name: str, dtype: torch.dtype, device: torch.device, quantize: bool) -> PreTrainedModel:
    """An architecture with random weights, made where they are used and in their final type: 8B needs no 16 GB first.

    Args:
        dtype: of everything that is not 4-bit.
        quantize: linear layers get random NF4 weights.
    """
    config = shape_config(name)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    if quantize:
        for layer in replace_linears(model, dtype):
            layer.weight = _random_nf4(layer.out_features, layer.in_features, dtype, device, generator)
    for parent in list(model.modules()):
        for key, parameter in list(parent._parameters.items()):
            if parameter is not None and parameter.is_meta:
                filled = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                plain = filled.dim() == 1  # norms and biases
                filled.fill_(float(key != "bias")) if plain else filled.normal_(0, 0.02, generator=generator)
                parent._parameters[key] = nn.Parameter(filled, requires_grad=False)
    trunk: Any = model.base_model
    rotary = trunk.rotary_emb  # its frequencies are computed when it is built
    trunk.rotary_emb = type(rotary)(config=config).to(device)
    model.tie_weights()
    return model


def replace_linears(model: PreTrainedModel, dtype: torch.dtype) -> list[Any]:
    """Put a 4-bit layer without weights, on `meta`, in the place of every linear one but lm_head; the new layers.

    Args:
        dtype: of everything that is not 4-bit.
    """
    head, made = model.get_output_embeddings(), []
    compute = torch.float16 if dtype == torch.float16 else torch.bfloat16
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not head:
                sizes = child.in_features, child.out_features
                layer = bnb.nn.Linear4bit(
                    *sizes, bias=child.bias is not None, compute_dtype=compute, quant_type="nf4", device="meta"
                )
                layer.bias = child.bias  # on meta still
                setattr(parent, name, layer)
                made.append(layer)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    return made


def _random_nf4(rows: int, columns: int, dtype: torch.dtype, device: torch.device, generator: Any) -> Any:
    """One layer's weight, quantised; its 16-bit values live only while this runs."""
    weight = torch.empty(rows, columns, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, quant_type="nf4", compress_statistics=True, bnb_quantized=True
    )
