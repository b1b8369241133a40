"""100,000 rows: read, split, tokenised and reported on in bounded memory. Run as a script it prints the figures.

python tests/test_large_data.py [ROWS]
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest


def write_rows(path: Path, rows: int) -> None:
    """Prompts of about 30 words and answers of about 120, of 5,000 made-up words; one row in a hundred twice."""
    source = random.Random(0)
    words = ["".join(source.choices("abcdefghijklmnoprstuvw", k=source.randint(2, 8))) for _ in range(5000)]
    with path.open("w", encoding="utf-8") as file:
        line = ""
        for i in range(rows):
            if i % 100 != 99:
                prompt, answer = (" ".join(source.choices(words, k=source.randint(*k))) for k in ((10, 50), (40, 200)))
                line = json.dumps({"prompt": f"{i} {prompt}", "completion": f"{answer}."}) + "\n"
            file.write(line)


def measure(path: Path) -> dict[str, float]:
    """Seconds and growth of the peak resident memory, in MiB, of each step, in this process."""
    import resource

    from transformers import AutoTokenizer

    from lowrank_rlhf.backbone.embedded import embedded_model
    from lowrank_rlhf.config import Data
    from lowrank_rlhf.data import Renderer, data_report, load_demonstrations, tokenize_demonstrations

    data = Data(train=str(path), eval_fraction=0.01, max_prompt_tokens=128, max_completion_tokens=384)
    renderer = Renderer(AutoTokenizer.from_pretrained(embedded_model()), data)

    def peak_mib() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    figures: dict[str, float] = {"start_mib": peak_mib()}
    started = time.perf_counter()

    def step(name: str) -> None:
        nonlocal started
        figures.update({f"{name}_seconds": time.perf_counter() - started, f"{name}_mib": peak_mib()})
        started = time.perf_counter()

    train, held_out = load_demonstrations(data)
    step("read")
    dataset, sizes = tokenize_demonstrations(train, renderer)
    step("tokenise")
    report = data_report("demonstrations", train, held_out, renderer, sizes)
    step("report")
    figures |= {"rows": len(dataset), "tokens": sum(sizes.prompt) + sum(sizes.completion)}
    figures |= {"exact_duplicates": report["duplicates"]["exact"], "near_duplicates": report["duplicates"]["near"]}
    return figures


def measured(path: Path, rows: int) -> dict[str, float]:
    """The figures of `rows` rows in a process of their own."""
    write_rows(path, rows)
    done = subprocess.run(
        [sys.executable, __file__, "--measure", str(path)], capture_output=True, text=True, check=True
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Ten times the rows, 100,000: the peak may grow by what a row costs in offsets, lengths and hashes, not texts."""
    few, many = (measured(tmp_path / f"{rows}.jsonl", rows) for rows in (10_000, 100_000))
    assert many["rows"] > 98_000
    assert many["report_mib"] - few["report_mib"] < 200
    assert many["exact_duplicates"] > 900


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]))))
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
            for name, value in measured(Path(folder) / "rows.jsonl", rows).items():
                print(f"{name:>18} {value:,.1f}")
