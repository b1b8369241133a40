"""Seconds and memory of one PPO step of TRL 0.22.2 in the setting of our own benchmark.

`PPOTrainer.train()` itself is timed, nothing of it is reimplemented: a step is everything between two `on_step_end`
(rollout, reference, values, scores, update). One step warms up; reported are the median of the others, and all.

- policy: the base with LoRA (`peft_config`); reference: the same base, adapter off, as TRL does without a `ref_model`
- value model: a second copy of the base with its own LoRA and a trained scalar head
- reward model: a third, frozen copy with a scalar head; both heads are random, the time does not depend on them
- float32, CPU, no gradient checkpointing; LoRA r 16, alpha 32, dropout 0 on all linear layers of the blocks
- all prompts are one batch, left-padded, 4 minibatches, `--inner-epochs` passes; temperature 1, no top-k, no top-p

Every row gets exactly `--new-tokens` tokens: without a `stop_token` TRL clears the policy's end-of-text id, so sampling
goes on behind an end of turn, and all of it is scored and learned. TRL masks whatever equals the pad token, inside a
prompt too, and this model's own pad token ends its turns: here pad is an id behind the vocabulary.

JSON on stdout and in --out. MiB are 2**20 bytes, `peak_rss_mib` is the process's VmHWM, `weights_mib` counts each
parameter once. `run.sh` installs the versions and runs this file; threads are OMP_NUM_THREADS.
"""

import argparse
import contextlib
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from trl import PPOConfig, PPOTrainer
from trl.trainer import ppo_trainer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": LINEAR}
PACKAGES = ["torch", "trl", "transformers", "peft", "accelerate", "datasets", "numpy"]
FIRST_STEP = ["objective/kl", "objective/entropy", "val/ratio"]


class Clock(transformers.TrainerCallback):
    """Seconds of each step and of its `batch_generation`, and the shapes of the completions."""

    def __init__(self):
        self.seconds, self.generating, self.shapes = [], [], set()
        self.generate, ppo_trainer.batch_generation = ppo_trainer.batch_generation, self.timed_generation

    def on_train_begin(self, args, state, control, **_):
        self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        before, self.last = self.last, time.perf_counter()
        self.seconds.append(round(self.last - before, 2))

    def timed_generation(self, model, queries, *rest):
        start = time.perf_counter()
        ids, logits = self.generate(model, queries, *rest)
        self.generating.append(round(time.perf_counter() - start, 2))
        self.shapes.add((ids.shape[0], ids.shape[1] - queries.shape[1]))
        return ids, logits


def build(folder, prompts, ppo, clock):
    """TRL's trainer on three copies of the base in `folder`."""
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=1)
    if theta := (getattr(config, "rope_parameters", None) or {}).get("rope_theta"):
        config.rope_theta = theta  # a config saved by transformers 5; 4.57 would silently use 10000
    classifier, load = transformers.AutoModelForSequenceClassification, {"config": config, "dtype": torch.float32}
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder, **load)
    # In place, not by `get_peft_model`: TRL looks for the trunk under the classifier's own attribute names
    value = inject_adapter_in_model(LoraConfig(**LORA), classifier.from_pretrained(folder, **load))
    value.score.requires_grad_(True)
    reward = classifier.from_pretrained(folder, **load).requires_grad_(False).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<pad>", padding_side="left"
    )
    assert tokenizer.pad_token_id >= config.vocab_size, "the pad token could be sampled"
    return PPOTrainer(
        args=ppo,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        callbacks=[clock],
    )


def peak_rss_mib():
    return round(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)


def weights(*models):
    """MiB of all and of the trained parameters, and how many copies of the base (token embeddings) they hold."""
    unique = {p.data_ptr(): (p, name) for model in models for name, p in model.named_parameters()}.values()
    total, trained = (sum(p.nbytes for p, _ in unique if p.requires_grad or every) for every in (True, False))
    return round(total / 2**20, 1), round(trained / 2**20, 1), sum("embed_tokens" in name for _, name in unique)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the base, safetensors")
    parser.add_argument("--prompts", type=Path, required=True, help="bench.json of `lowrank-rlhf bench`")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one that warms up")
    parser.add_argument("--inner-epochs", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    prompts, clock = json.loads(options.prompts.read_text())["rows"]["ppo"]["prompt_ids"], Clock()
    transformers.set_seed(0)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        run = {"output_dir": scratch, "report_to": "none", "save_strategy": "no", "num_sample_generations": 0}
        batch = {"per_device_train_batch_size": len(prompts), "num_mini_batches": min(4, len(prompts))}
        length = {"total_episodes": len(prompts) * (1 + options.steps), "num_ppo_epochs": options.inner_epochs}
        rollout = {"response_length": options.new_tokens, "temperature": 1.0}
        # TRL's default is bf16, also on CPU; its default of gradient checkpointing has no effect in PPOTrainer
        ppo = PPOConfig(**run, **batch, **length, **rollout, bf16=False, use_cpu=True, gradient_checkpointing=False)
        trainer = build(options.model, prompts, ppo, clock)
        loaded = peak_rss_mib()
        assert trainer.policy_model.generation_config.eos_token_id is None, "rows would stop early"
        trainer.train()
    assert clock.shapes == {(len(prompts), options.new_tokens)}, f"completions of shape {clock.shapes}"
    total, trained, copies = weights(trainer.model, trainer.reward_model)
    result = {
        "seconds_per_step": statistics.median(clock.seconds[1:]),
        "seconds": clock.seconds,
        "seconds_generating": clock.generating,
        "peak_rss_mib": peak_rss_mib(),
        "peak_rss_before_training_mib": loaded,
        "weights_mib": total,
        "trained_weights_mib": trained,
        "base_copies": copies,
        "prompt_tokens": [len(ids) for ids in prompts],
        "new_tokens": options.new_tokens,
        "inner_epochs": options.inner_epochs,
        "minibatches": ppo.num_mini_batches,
        "first_step": {key: trainer.state.log_history[0][key] for key in FIRST_STEP},
        "torch_threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": sys.version.split()[0]},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(options.out.read_text(), end="")


if __name__ == "__main__":
    main()
