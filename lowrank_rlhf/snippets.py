"""The Python in the cards of exports: how to load and use them with plain transformers and PEFT."""

# model: (import, how `base` is made); any other base is a hub id or a folder
BASES = {
    "tiny": (
        "from lowrank_rlhf.backbone.tiny import tiny_model",
        'base = "tiny"\ntiny_model().save_pretrained(base)',
    ),
    "smollm2-135m-instruct": (
        "from lowrank_rlhf.backbone.embedded import embedded_model  # this base is on no model hub",
        "base = str(embedded_model())",
    ),
}
NF4 = """
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
    llm_int8_skip_modules=["lm_head", "score"],
)"""
SCORE = """

def ids(prompt, answer):
    asked = [{{"role": "user", "content": prompt}}]
    before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*asked, {{"role": "assistant", "content": answer}}], tokenize=False)
    end = whole.rindex({end!r}) + len({end!r})  # what the template writes behind it is not scored
    parts = tokenizer([before, whole[len(before) : end]], add_special_tokens=False)["input_ids"]
    return parts[0] + parts[1]


batch = {{"input_ids": [ids("What is 2 + 2?", "4."), ids("What is 2 + 2?", "I have no idea.")]}}
inputs = tokenizer.pad(batch, return_tensors="pt").to(model.device)
with torch.no_grad():
    scores = model(**inputs).logits[:, 0]"""
ANSWER = """
asked = [{{"role": "user", "content": "What is 2 + 2?"}}]
inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
inputs = {{name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}}
output = model.generate(**inputs, max_new_tokens=64, do_sample=True, temperature=1.0, top_k=0)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)"""


def snippet(
    model: str, revision: str | None, *, classifier: bool, merged: bool, quantization: str, end_of_turn: str
) -> str:
    """A Python block that loads the folder of an export and uses it once.

    Args:
        model, revision: of the base.
        quantization: how the run loaded the base; an adapter is shown on the same.
        end_of_turn: the token that ends an answer.
    """
    kind = "AutoModelForSequenceClassification" if classifier else "AutoModelForCausalLM"
    nf4 = quantization == "nf4" and not merged
    imports, made = BASES.get(model, ("", f"base = {model!r}"))
    lines = ["import torch"] + ([] if merged else ["from peft import PeftModel"])
    lines += [f"from transformers import {kind}, AutoTokenizer{', BitsAndBytesConfig' if nf4 else ''}"]
    lines += [imports] if imports and not merged else []
    lines += ["", 'folder = "this folder"', "tokenizer = AutoTokenizer.from_pretrained(folder)"]
    if merged:
        lines += [f"model = {kind}.from_pretrained(folder).eval()"]
    else:
        is_hub = model not in BASES and revision and not revision.startswith("folder-")
        arguments = ["base", *([f"revision={revision!r}"] if is_hub else [])]
        arguments += ["num_labels=1", "pad_token_id=tokenizer.pad_token_id"] if classifier else []
        arguments += ["quantization_config=quantization"] if nf4 else []
        lines += [made, *([NF4.strip()] if nf4 else []), f"model = {kind}.from_pretrained("]
        lines += [f"    {', '.join(arguments)}", ")", "model = PeftModel.from_pretrained(model, folder).eval()"]
    usage = (SCORE if classifier else ANSWER).format(end=end_of_turn)
    return "\n".join(["```python", *lines, usage, "```", ""])
