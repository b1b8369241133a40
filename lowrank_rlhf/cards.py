"""The model card of a saved role: what it is, how it was trained and judged, how to load it, what not to trust."""

from pathlib import Path
from typing import Any

METHODS = {
    "sft": "Supervised fine-tuning: cross-entropy on the answers' tokens.",
    "reward": "Reward model: Bradley–Terry, −log σ(r_chosen − r_rejected).",
    "ppo": "PPO: clipped surrogate, GAE, KL to the reference in the reward.",
}
HEAD = """
`head.safetensors` holds the fp32 scalar head `linear.weight`, shape (1, hidden): it is read at the last attended token,
which is the end-of-turn token of the answer. `probe.json` is a batch with its scores, to check a loaded copy against.
"""
LIMITS = {
    "policy": "It was optimised against a learned or hand-written reward and may exploit its faults.",
    "reward": "Scores compare answers to one prompt, not prompts, and are only as good as the labels.",
    "value": "It predicts the return of the policy it was trained beside, and of no other.",
    "sft": "It imitates its demonstrations, mistakes included.",
}
LOAD = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

base = AutoModelForCausalLM.from_pretrained("{model}"{quantization})
model = PeftModel.from_pretrained(base, "this folder")
```
"""
NF4 = """, quantization_config=BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
)"""


def model_card(role: str, info: dict[str, Any], metrics: dict[str, float], *, has_head: bool) -> str:
    """The card of a role, in Markdown with the hub's front matter.

    Args:
        info: what run.json says of the run.
        metrics: the last ones.
    """
    base, recipe = info["base"], info["recipe"]
    nf4 = base["quantization"] == "nf4"
    model = Path(base["model"]).name if Path(base["model"]).is_absolute() else base["model"]
    facts = {
        "method": METHODS[info["stage"]],
        "base": f"`{model}`, revision `{base['revision']}`, loaded as {base['quantization']}",
        "data": f"`{Path(recipe['data']['train']).name}`, hash `{info.get('data_hash')}`",
        "reference": info.get("reference"),
        "LoRA": ", ".join(f"{key} {value}" for key, value in recipe["lora"].items()),
        "training": ", ".join(f"{key} {value}" for key, value in recipe["train"].items() if value is not None),
        "seed": recipe["seed"],
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
    figures = [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
    lines = [
        "---",
        f"base_model: {model}",
        "library_name: peft",
        f"tags: [lora, lowrank-rlhf, {info['stage']}]",
    ]
    lines += ["---", "", f"# {role} adapter", "", "| | |", "|---|---|", *rows, ""]
    if figures:
        lines += ["| last metrics | |", "|---|---|", *figures, ""]
    lines += [LOAD.format(model=model, quantization=NF4 if nf4 else "")]
    if has_head:
        lines += [HEAD.strip(), ""]
    limits = ["Do not merge it into the 4-bit base: that loses most of it; merge into the 16-bit one."] if nf4 else []
    return "\n".join([*lines, "## Limits", "", *(f"- {text}" for text in [LIMITS.get(role), *limits] if text), ""])
