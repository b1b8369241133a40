"""The model card of a saved role: what it is, how it was trained and judged, how to load it, what not to trust."""

from pathlib import Path
from typing import Any

from lowrank_rlhf.snippets import snippet

METHODS = {
    "sft": "Supervised fine-tuning: cross-entropy on the answers' tokens.",
    "reward": "Reward model: Bradley–Terry, −log σ(r_chosen − r_rejected).",
    "ppo": "PPO: clipped surrogate, GAE, KL to the reference in the reward.",
    "dpo": "DPO: −log σ(β · the lead of log π/π_ref of the chosen answer), or another of trl's losses.",
    "orpo": "ORPO: −log p per token of the chosen answer, −β log σ of the log odds ratio of the two answers.",
    "kto": "KTO: σ(β(log π/π_ref − KL)) up for liked answers, down for disliked ones.",
    "grpo": "GRPO: clipped surrogate, advantages relative to the other answers to the same prompt, no value model.",
}
HEAD = """
`head.safetensors` holds the fp32 scalar head `linear.weight`, shape (1, hidden): it is read at the last attended token,
which is the end-of-turn token of the answer. `probe.json` is a batch with its scores, to check a loaded copy against.
"""
LEARNED = "It learned what its data prefer, the errors of their labels included."
LIMITS = {
    "dpo": LEARNED,
    "orpo": LEARNED,
    "kto": LEARNED,
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


NO_MERGE = (
    "Do not merge it into the 4-bit base: that loses most of it; `lowrank-rlhf export --merge` makes 16-bit models."
)
CLASSIFIER = """
It reads the state of the last token that is not `{pad}`, the pad token, in which no text ends. In training, texts were
at most {max_prompt_tokens} tokens of prompt, cut at the front, and {max_completion_tokens} of answer.
"""
CHECKS = {
    "fp32_right_padding": "this folder on the fp32 base, texts padded on the right, with our own scores there",
    "fp32_left_padding": "this folder on the fp32 base, texts padded on the left, with our own scores there",
    "fp32": "this folder on the fp32 base with our own logits there",
    "fp32_and_run": "the fp32 base with the run's own",
    "merged_and_adapter": "the merged model with the adapter on the 16-bit base",
    "merged_and_run": "the merged model with the run",
}
MERGED = {
    None: "It was trained on the base in NF4. On the base in 16 bit it is another model, as the comparison above says; "
    "do not merge it: `lowrank-rlhf export --merge` does, into the values of the NF4 weights.",
    "trained": "Its base weights are the values of the NF4 weights it was trained on, not the base's own.",
    "original": "It was trained on the base in NF4 and merged into the base's own 16-bit weights, where it is another "
    "model, as the comparison above says.",
}


def model_card(role: str, info: dict[str, Any], metrics: dict[str, float], *, has_head: bool) -> str:
    """The card of a role, in Markdown with the hub's front matter.

    Args:
        info: what run.json says of the run.
        metrics: the last ones.
    """
    nf4 = info["base"]["quantization"] == "nf4"
    usage = LOAD.format(model=_public(info["base"]["model"]), quantization=NF4 if nf4 else "")
    if has_head:
        usage += HEAD.lstrip()
    limits = [LIMITS.get(info["stage"], LIMITS.get(role, "")), NO_MERGE if nf4 else ""]
    return _card(
        f"{role} adapter", "peft", ["lora", info["stage"]], info, _table("last metrics", metrics), usage, limits
    )


def export_card(role: str, info: dict[str, Any], report: dict[str, Any], *, end_of_turn: str) -> str:
    """The card of an exported role.

    Args:
        info: what run.json says of the run.
        report: what export.json says of the export.
        end_of_turn: the token that ends an answer.
    """
    base, merged = info["base"], report["merge"] is not None
    usage = snippet(
        _public(base["model"]),
        base["revision"],
        classifier=report["classifier"],
        merged=merged,
        quantization=base["quantization"],
        end_of_turn=end_of_turn,
    )
    if report["classifier"]:
        usage += CLASSIFIER.format(pad=report["pad_token"], **info["recipe"]["data"])
    limits = [LIMITS.get(info["stage"], LIMITS.get(role.partition("_")[0], ""))]
    if base["quantization"] == "nf4":
        limits.append(MERGED[report["merge"]])
    tables = _table("last metrics", {k: v for k, v in info.get("final", {}).items() if isinstance(v, int | float)})
    for name, found in report["checks"].items():
        tables += _table(f"compared: {CHECKS[name]}", found)
    kind = "sequence classifier" if report["classifier"] else "causal model"
    title = f"{role}: merged 16-bit {kind}" if merged else f"{role}: adapter of a {kind}"
    tags = [info["stage"]] if merged else ["lora", info["stage"]]
    return _card(title, "transformers" if merged else "peft", tags, info, tables, usage, limits)


def _card(
    title: str, library: str, tags: list[str], info: dict[str, Any], tables: list[str], usage: str, limits: list[str]
) -> str:
    base, recipe = info["base"], info["recipe"]
    model = _public(base["model"])
    facts = {
        "method": METHODS[info["stage"]],
        "base": f"`{model}`, revision `{base['revision']}`, loaded as {base['quantization']}",
        "data": f"`{Path(recipe['data']['train']).name}`, hash `{info.get('data_hash')}`",
        "today, to the chat template": info.get("data_report", {}).get("template_date"),
        "reference": info.get("reference"),
        "LoRA": ", ".join(f"{key} {value}" for key, value in recipe["lora"].items()),
        "training": ", ".join(f"{key} {value}" for key, value in recipe["train"].items() if value is not None),
        "seed": recipe["seed"],
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
    lines = ["---", f"base_model: {model}", f"library_name: {library}", f"tags: [{', '.join([*tags, 'lowrank-rlhf'])}]"]
    lines += ["---", "", f"# {title}", "", "| | |", "|---|---|", *rows, "", *tables, usage]
    return "\n".join([*lines, "## Limits", "", *(f"- {text}" for text in limits if text), ""])


def _table(title: str, figures: dict[str, float]) -> list[str]:
    rows = [f"| {name} | {value:.4g} |" for name, value in figures.items()]
    return [f"| {title} | |", "|---|---|", *rows, ""] if rows else []


def _public(model: str) -> str:
    """A base's name without the folders of this machine."""
    return Path(model).name if Path(model).is_absolute() else model
