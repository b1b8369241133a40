"""What sharing one base promises, as the peak memory of whole commands on the embedded base in NF4.

Minutes rather than seconds, so only `pytest -m slow -s` runs it; -s shows the figures.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "recipes/quickstart/data/preferences_test.jsonl"
PAIRS = 32
PROMPTS = ROOT / "recipes/quickstart/data/prompts_train.jsonl"
# All 64 answers in one forward, which takes more than loading the base does
BATCH = 2 * PAIRS
# Bytes that malloc has given out, torch's CPU tensors among them, every 20 ms: a peak lasts a tenth of a second. Not
# what is resident: glibc keeps freed blocks in pieces, up to 2 GiB of them, another amount in each process
COMMAND = """
import ctypes, sys, threading, time
from lowrank_rlhf.cli import main
from lowrank_rlhf.stages import dpo, grpo, kto, orpo, ppo, reward, sft

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Counts

def in_use():
    counts = mallinfo()
    return counts.uordblks + counts.hblkhd  # in the heaps, and in mappings of their own

def watch():
    global peak
    while True:
        peak = max(peak, in_use())
        time.sleep(0.02)

imports = peak = in_use()
threading.Thread(target=watch, daemon=True).start()
status = main(sys.argv[1:])
print(peak - imports)
sys.exit(status)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the count is glibc's"),
]


def command(*arguments):
    """What the command says, and the most memory that it had in use beyond its imports, in GiB."""
    words = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # every thread has buffers of its own
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *said, peak = done.stdout.splitlines()
    return said, int(peak) / 2**30


def test_four_members_score_in_little_more_memory_than_one(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(ROWS.read_text(encoding="utf-8").splitlines(keepends=True)[:PAIRS]), encoding="utf-8")
    peaks = {}
    for members in (1, 4):
        run = tmp_path / f"members-{members}"
        settings = ["data.max_rows=24", "data.eval_fraction=0", "base.quantization=nf4"]
        settings += ["train.max_steps=1", "train.batch_size=1", "train.micro_batch_size=1"]
        command(
            "reward", "--config", "recipes/reward.yaml", *settings, f"reward_model.members={members}", f"run_dir={run}"
        )
        flags = ["--batch-size", BATCH, "--out", f"{run}.scores.jsonl"]
        said, peaks[members] = command("score", run, "--in", rows, *flags)
        print(f"{peaks[members]:.3f} GiB at the peak,", next(line for line in said if "MB of adapter" in line))
    scored = [json.loads(line) for line in (tmp_path / "members-4.scores.jsonl").read_text().splitlines()]
    assert len(scored) == PAIRS
    assert min(row["chosen_disagreement"] for row in scored) > 0
    print(f"four members / one: {peaks[4] / peaks[1]:.3f}")
    assert peaks[4] <= 1.3 * peaks[1]


@pytest.fixture
def train(tmp_path):
    """Two steps of a stage on micro-batches of 4 rows × 256 tokens, half of them prompt; its peak."""
    texts = [f"Go on with this: {'one two three four five six seven eight nine ten ' * 20}{n}" for n in range(8)]
    rows = {"prompts": [{"prompt": text} for text in texts]}
    rows["demonstrations"] = [{"prompt": text, "completion": text} for text in texts]
    rows["pairs"] = [{"prompt": text, "chosen": text, "rejected": f"no {text}"} for text in texts]
    settings = ["base.quantization=nf4", "data.max_prompt_tokens=128", "data.max_completion_tokens=128"]
    settings += ["train.batch_size=4", "train.micro_batch_size=4", "train.max_steps=2", "data.eval_fraction=0"]
    for name, content in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in content), encoding="utf-8")

    def train(stage, recipe, data, *more):
        flags = [f"run_dir={tmp_path}/{stage}", f"data.train={tmp_path}/{data}.jsonl", *settings, *more]
        _, peak = command(stage, "--config", f"recipes/{recipe}.yaml", *flags)
        print(f"{stage}: {peak:.3f} GiB at the peak")
        return peak

    return train


def test_learning_from_preferences_takes_little_more_memory_than_sft(train, tmp_path):
    """Two pairs, or four single answers, in the place of four demonstrations; DPO and KTO with a frozen start."""
    sft = train("sft", "sft", "demonstrations")
    for stage, rows in (("dpo", 2), ("orpo", 2), ("kto", 4)):
        sizes = [f"train.batch_size={rows}", f"train.micro_batch_size={rows}", f"policy_from={tmp_path}/sft"]
        peak = train(stage, stage, "pairs", *sizes)
        print(f"{stage} / SFT: {peak / sft:.3f}")
        assert peak <= 1.3 * sft


def test_ppo_and_grpo_take_little_more_memory_than_sft(train, tmp_path):
    """Both with an SFT start, its frozen copy and a reward model, PPO with a value model of its own."""
    sft = train("sft", "sft", "demonstrations")
    train("reward", "reward", "pairs", "train.batch_size=2", "train.micro_batch_size=2")
    starts = [f"policy_from={tmp_path}/sft", f"reward_from=[{{run: {tmp_path}/reward}}]", "data.eval=null"]
    sizes = ["train.batch_size=8", "train.max_steps=1", "rollout.batch_size=8"]
    ppo = train("ppo", "ppo_from_sft", "prompts", *starts, *sizes)
    print(f"PPO / SFT: {ppo / sft:.3f}")
    lengths = [json.loads(line)["objective/length"] for line in (tmp_path / "ppo/metrics.jsonl").open()]
    assert max(lengths) > 64, "the rows are to be 256 tokens long"
    assert ppo <= 1.25 * sft
    group = ["train.batch_size=1", "grpo.group_size=4", "grpo.minibatches=1", "rollout.batch_size=4", "reward=null"]
    grpo = train("grpo", "grpo", "prompts", *starts, *group)
    print(f"GRPO / SFT: {grpo / sft:.3f}")
    assert grpo <= 1.3 * sft
