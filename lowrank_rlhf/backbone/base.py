"""Loading the one base model for training and scoring; `plain` loads it the way others do, to export."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lowrank_rlhf import memory, processes
from lowrank_rlhf.backbone import embedded, shapes, tiny
from lowrank_rlhf.backbone.lm_head import read_contiguously
from lowrank_rlhf.config import Base
from lowrank_rlhf.errors import UserError


@dataclass(frozen=True)
class BaseInfo:
    """What identifies a loaded base: adapters and heads are only valid on the same one."""

    model: str
    revision: str | None
    quantization: str
    dtype: str
    device: str
    tokenizer_hash: str
    template_hash: str
    pad_token_id: int
    eos_token_id: int

    @property
    def fast_products(self) -> bool:
        """Whether fp32 products may round to bf16, as those of the 4-bit layers do anyway."""
        return self.quantization == "nf4" and self.device == "cpu"

    def mismatch(self, other: dict[str, Any]) -> str | None:
        """In words, why an adapter trained on `other` must not be loaded on this base; None when it may."""
        reasons = {
            "model": "another base model",
            "revision": "another revision of the base",
            "quantization": "another quantisation",
            "template_hash": "another chat template",
        }
        for key, reason in reasons.items():
            if other.get(key) != getattr(self, key):
                return f"{reason} ({key} {other.get(key)!r}, here {getattr(self, key)!r})"
        return None


def pick_device(name: str) -> torch.device:
    """`auto`: whatever accelerator torch offers, else the CPU. Of several processes each gets its own card.

    Raises:
        UserError: the device does not exist here.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = accelerator or torch.device("cpu")
    else:
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"base.device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if processes.count() > 1 and device.type != "cpu":
        return torch.device(device.type, torch.accelerator.current_device_index())
    return device


def pick_dtype(device: torch.device) -> torch.dtype:
    """The type of everything that is not 4-bit: fp32 on CPU (bf16 trains 25 times slower there), else bf16 or fp16."""
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def load_base(
    config: Base, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, BaseInfo]:
    """The base model, frozen and in eval mode, its tokenizer, and what identifies it.

    Args:
        config: `model` is `smollm2-135m-instruct`, `tiny`, a hub id or a local folder.
        dtype: of what is not 4-bit; None picks what the device computes best.

    Raises:
        UserError: the model cannot be found or loaded, or post-processes its logits in a way we cannot reproduce.
    """
    device = pick_device(config.device)
    dtype = dtype or pick_dtype(device)
    if config.model == tiny.MODEL_ID:
        model, tokenizer, revision = _tiny(config, device, dtype)
    elif config.model.startswith(shapes.PREFIX):
        shape, nf4 = config.model.removeprefix(shapes.PREFIX), config.quantization == "nf4"
        model, tokenizer, revision = shapes.random_model(shape, dtype, device, nf4), tiny.tiny_tokenizer(), "seed-0"
    else:
        model, tokenizer, revision = _from_pretrained(config, device, dtype)
    keep_autograd_on_cpu(model)
    if device.type == "cpu":
        memory.keep_freed()
    model.requires_grad_(False)
    model.eval()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # The file's own defaults (temperature 0.7, repetition_penalty 1.1 …) would make rollouts another distribution
    # than the one that is scored. Only the token ids stay.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    info = BaseInfo(
        model=config.model,
        revision=revision,
        quantization=config.quantization,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        tokenizer_hash=_hash(sorted(tokenizer.get_vocab().items())),
        template_hash=_hash(tokenizer.chat_template),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    read_contiguously(model)
    return model, tokenizer, info


def keep_autograd_on_cpu(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for AVX512-BF16.

    On such a CPU the first eval-mode forward repacks each `Linear4bit` in place, and from then on its matmul has no
    autograd: gradients of everything below are wrong, the loss looks right and nothing is raised. This function must
    see every model before its first forward. No effect on CUDA.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def four_bit_weights(model: nn.Module) -> list[torch.Tensor]:
    """The packed weight of every 4-bit layer, for tests and for reports of what is in memory."""
    return [module.weight for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def logit_transform(config: Any) -> tuple[float, float | None]:
    """What the model does to its logits after lm_head: (scale, softcap), from the model's own config."""
    text = config.get_text_config()
    scale = 1.0
    if getattr(text, "logit_scale", None) is not None:  # Cohere multiplies
        scale = text.logit_scale
    elif getattr(text, "logits_scaling", None) is not None:  # Granite divides
        scale = 1.0 / text.logits_scaling
    return scale, getattr(text, "final_logit_softcapping", None)  # Gemma 2


@torch.no_grad()
def check_logit_path(model: PreTrainedModel) -> None:
    """Compare lm_head on the final hidden state, as we compute log-probabilities, with the model's own logits.

    Raises:
        UserError: they differ, so every log-probability would be wrong on this architecture.
    """
    tokens = torch.arange(4, device=model.device).unsqueeze(0)
    own = model(input_ids=tokens, use_cache=False).logits.float()
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    scale, softcap = logit_transform(model.config)
    ours = model.get_output_embeddings()(hidden).float() * scale
    if softcap is not None:
        ours = softcap * torch.tanh(ours / softcap)
    if not torch.allclose(own, ours, atol=1e-2 * float(own.abs().max().clamp(min=1))):
        raise UserError(
            f"base.model: {model.config.model_type} changes its logits after lm_head in a way this version does not "
            "know, so log-probabilities would be wrong; please report the architecture"
        )


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        # The matmul of dequantised weights runs in bf16 on CPU too: measured faster there than fp32 weights
        bnb_4bit_compute_dtype=torch.float16 if dtype == torch.float16 else torch.bfloat16,
    )


def _tiny(
    config: Base, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None]:
    model: PreTrainedModel = tiny.tiny_model()
    model.to(dtype=dtype)  # type: ignore[call-arg]
    if config.quantization == "nf4":
        _quantize_in_place(model, dtype)
    model.to(device=device)  # type: ignore[call-arg]
    return model, tiny.tiny_tokenizer(), tiny.REVISION


def _from_pretrained(
    config: Base, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None]:
    source, revision = resolve_source(config)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            device_map={"": device},
            quantization_config=_nf4(dtype) if config.quantization == "nf4" else None,
            **revision,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"base.model: {config.model!r} cannot be loaded as a causal language model: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    if config.model == embedded.MODEL_ID:
        return model, tokenizer, embedded.REVISION
    if Path(source).is_dir():
        return model, tokenizer, folder_revision(Path(source))
    return model, tokenizer, getattr(model.config, "_commit_hash", None) or config.revision


def resolve_source(config: Base) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes: a hub id or a folder, and the revision as a keyword where there is one."""
    if config.model != embedded.MODEL_ID:
        return config.model, {} if config.revision is None else {"revision": config.revision}
    if config.revision not in (None, embedded.REVISION):
        raise UserError(f"base.revision: {embedded.MODEL_ID} has one revision, {embedded.REVISION}; drop the key")
    return str(embedded.embedded_model()), {}


def folder_revision(folder: Path, tail_bytes: int = 2**20) -> str:
    """What identifies a local model: its config and the end of each weight file (all of it would take minutes)."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            file.seek(max(0, size - tail_bytes))
            digest.update(file.read())
    return f"folder-sha256-{digest.hexdigest()[:16]}"


def _quantize_in_place(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """NF4 for the random tiny model, which has no checkpoint that `from_pretrained` could quantise while loading."""
    compute = _nf4(dtype).bnb_4bit_compute_dtype
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not model.get_output_embeddings():
                layer = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    compute_dtype=compute,
                    quant_type="nf4",
                    compress_statistics=True,
                )
                layer.weight = bnb.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                setattr(parent, name, layer)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
