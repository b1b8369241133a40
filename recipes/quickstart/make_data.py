"""python -m recipes.quickstart.make_data: everything in recipes/quickstart/data but prompts.jsonl and README.md.

Splits the prompts, samples the embedded base (the slow part; interrupted, the same command goes on), and labels the
samples by the gold rule. Same machine, same bytes.
"""

import gzip
import hashlib
import itertools
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from lowrank_rlhf.cli import quiet, run_safely
from recipes.quickstart.gold import score

DATA = Path(__file__).parent / "data"
WORK = Path("runs/quickstart-data")  # where sampling is interrupted and goes on
MODEL, MAX_NEW_TOKENS, BATCH_SIZE = "smollm2-135m-instruct", 90, 96
SEED = 0
HELD_OUT = {"test": 120, "eval": 60}
ANSWERS = {"train": 6, "eval": 4, "test": 4}
DRAFTS, DRAFT_TEMPERATURE = 4, 0.7  # of train's prompts, to choose demonstrations from: calmer than what is compared
PAIRS = {"train": 3, "eval": 2, "test": 2}  # at most, per prompt
KEPT = {"pairs": 1020, "rankings": 130}  # at most, of train: the repository stays small
NOISE = 0.1
RANKED = 4

Row = dict[str, Any]


def main() -> int:
    quiet()
    from lowrank_rlhf.sampling import Sampling, sample

    prompts = split_prompts(read_rows(DATA / "prompts.jsonl"))
    for split, rows in prompts.items():
        (DATA / f"prompts_{split}.jsonl").write_bytes(as_jsonl(rows))
    plan = {split: (split, ANSWERS[split], 1.0) for split in prompts}
    samples = {}
    for name, (split, k, temperature) in {**plan, "drafts": ("train", DRAFTS, DRAFT_TEMPERATURE)}.items():
        out = sample(
            Sampling(
                source=MODEL,
                prompts=str(DATA / f"prompts_{split}.jsonl"),
                out=str(WORK / f"samples_{name}.jsonl"),
                k=k,
                temperatures=(temperature,),
                seed=SEED,
                batch_size=BATCH_SIZE,
                max_new_tokens=MAX_NEW_TOKENS,
            )
        )
        samples[name] = read_rows(out)
    for name, content in files(samples).items():
        (DATA / name).write_bytes(content)
    print(report(samples))
    return 0


def split_prompts(rows: list[Row]) -> dict[str, list[Row]]:
    """Every prompt on one side, by the hash of its text; each side in the order of the file."""
    order = sorted(rows, key=lambda row: hashlib.sha256(row["prompt"].encode()).hexdigest())
    side = dict.fromkeys((row["prompt"] for row in rows), "train")
    for split, count in HELD_OUT.items():
        side |= {row["prompt"]: split for row in order[:count]}
        order = order[count:]
    return {split: [row for row in rows if side[row["prompt"]] == split] for split in ("train", *HELD_OUT)}


def files(samples: dict[str, list[Row]]) -> dict[str, bytes]:
    """Name and content of every file that is made from some of the samples."""
    found = {}
    for split, rows in samples.items():
        if split == "drafts":
            found["demonstrations.jsonl"] = demonstrations(rows)
            continue
        pairs = preferences(rows, PAIRS[split])
        if split == "train":
            found["rankings_train.jsonl"] = with_noise(some(rankings(rows), KEPT["rankings"]), flip_ranking)
            pairs = with_noise(some(pairs, KEPT["pairs"]), flip_pair)
        else:
            found[f"samples_{split}.jsonl.gz"] = rows
        found[f"preferences_{split}.jsonl"] = pairs
    return {name: packed(as_jsonl(rows)) if name.endswith(".gz") else as_jsonl(rows) for name, rows in found.items()}


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)  # the time would make every run differ


def gold_scores(row: Row) -> list[float]:
    return [score(response, row["must_mention"]) for response in row["responses"]]


def demonstrations(samples: list[Row]) -> list[Row]:
    """One answer per prompt, any of those in the upper half of all scores that came to an end by themselves.

    Not the best one, so that later stages have something to gain.
    """
    median = statistics.median(value for row in samples for value in gold_scores(row))
    rows = []
    for row in samples:
        answers = zip(row["responses"], gold_scores(row), row["ended"], strict=True)
        upper = [(text, value) for text, value, ended in answers if ended and value >= median]
        if upper:
            text, value = rng("demonstration", row).choice(upper)
            rows.append({"prompt": row["prompt"], "completion": text, "gold": value})
    return rows


def preferences(samples: list[Row], limit: int) -> list[Row]:
    """Up to `limit` pairs per prompt, drawn from all whose scores differ; the higher score is chosen."""
    rows = []
    for row in samples:
        answers = sorted(zip(gold_scores(row), row["responses"], strict=True), reverse=True)
        pairs = [(high, low) for high, low in itertools.combinations(answers, 2) if high[0] > low[0]]
        for (gold_chosen, chosen), (gold_rejected, rejected) in rng("pairs", row).sample(pairs, min(limit, len(pairs))):
            shared = {"prompt": row["prompt"], "must_mention": row["must_mention"]}
            golds = {"gold_chosen": gold_chosen, "gold_rejected": gold_rejected}
            rows.append({**shared, "chosen": chosen, "rejected": rejected, **golds})
    return rows


def rankings(samples: list[Row]) -> list[Row]:
    """Four answers per prompt whose scores all differ, where there are four; `ranking[i]` is the rank of answer i."""
    rows = []
    for row in samples:
        values = gold_scores(row)
        fours = [four for four in itertools.combinations(range(len(values)), RANKED) if _differ(values, four)]
        if fours:
            four = rng("ranking", row).choice(fours)
            golds = [values[i] for i in four]
            rows.append(
                {
                    "prompt": row["prompt"],
                    "must_mention": row["must_mention"],
                    "responses": [row["responses"][i] for i in four],
                    "ranking": [1 + sum(other > value for other in golds) for value in golds],
                    "gold": golds,
                }
            )
    return rows


def _differ(values: list[float], chosen: tuple[int, ...]) -> bool:
    return len({values[i] for i in chosen}) == len(chosen)


def some(rows: list[Row], count: int) -> list[Row]:
    """`count` rows, all where there are fewer, in a random order: the first hundred are a sample of the prompts."""
    return random.Random(f"{SEED} kept").sample(rows, min(count, len(rows)))


def with_noise(rows: list[Row], flip: Any) -> list[Row]:
    """A tenth of the rows labelled wrongly, and every row saying whether it is one of them."""
    wrong = set(random.Random(f"{SEED} noise").sample(range(len(rows)), round(NOISE * len(rows))))
    return [{**(flip(row) if i in wrong else row), "flipped": i in wrong} for i, row in enumerate(rows)]


def flip_pair(row: Row) -> Row:
    """The worse answer becomes the chosen one; the gold columns stay true to the texts."""
    swap = {"chosen": "rejected", "rejected": "chosen", "gold_chosen": "gold_rejected", "gold_rejected": "gold_chosen"}
    return {swap.get(name, name): value for name, value in row.items()}


def flip_ranking(row: Row) -> Row:
    """Two answers, whichever, change ranks."""
    ranking = list(row["ranking"])
    i, j = rng("flip", row).sample(range(len(ranking)), 2)
    ranking[i], ranking[j] = ranking[j], ranking[i]
    return {**row, "ranking": ranking}


def rng(purpose: str, row: Row) -> random.Random:
    """Chance that depends on the prompt alone, not on the rows before it."""
    return random.Random(f"{SEED} {purpose} {row['prompt']}")


def report(samples: dict[str, list[Row]]) -> str:
    """The base's distribution of gold, and the size of every file."""
    lines = []
    for name, rows in samples.items():
        values = [value for row in rows for value in gold_scores(row)]
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        ended = statistics.fmean(flag for row in rows for flag in row["ended"])
        percentiles = "  ".join(f"{p} % {tenths[p // 10 - 1]:.2f}" for p in (10, 30, 50, 70, 90))
        spread = f"gold {statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"
        lines.append(f"{name}: {len(rows)} prompts, {len(values)} answers, {ended:.0%} ended; {spread}; {percentiles}")
    written = sorted(DATA.glob("*.jsonl*"))
    return "\n".join(lines + [f"{p.name}: {len(read_rows(p))} rows, {p.stat().st_size} bytes" for p in written])


def read_rows(path: Path) -> list[Row]:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    return [json.loads(line) for line in text.split("\n") if line]


def as_jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows).encode()


if __name__ == "__main__":
    sys.exit(run_safely(main))
