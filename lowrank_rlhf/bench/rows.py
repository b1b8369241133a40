"""What the benchmark learns from: short questions and answers of its own, so that it runs anywhere and offline."""

import json
from pathlib import Path

PROMPTS, DEMONSTRATIONS, PAIRS = "prompts.jsonl", "demonstrations.jsonl", "pairs.jsonl"
THINGS = ("rivers", "bridges", "kettles", "letters", "orchards", "clocks", "maps", "lamps")
PLACES = ("a small town", "the mountains", "an old harbour", "a quiet library")


def write_rows(folder: Path, count: int, answer_words: int) -> None:
    """`count` prompts of like length, each with an answer, and with a better and a worse one.

    Args:
        answer_words: of an answer; the recipe's limit cuts it to the number of tokens that is measured.
    """
    questions = [
        f"Why do {THINGS[i % len(THINGS)]} matter to {PLACES[i // len(THINGS) % len(PLACES)]}?" for i in range(count)
    ]
    answers = [" ".join(f"{THINGS[(i + j) % len(THINGS)]} and" for j in range(answer_words)) for i in range(count)]
    rows = {
        PROMPTS: [{"prompt": f"{q} ({i})"} for i, q in enumerate(questions)],
        DEMONSTRATIONS: [
            {"prompt": f"{q} ({i})", "completion": a} for i, (q, a) in enumerate(zip(questions, answers, strict=True))
        ],
        PAIRS: [
            {"prompt": f"{q} ({i})", "chosen": f"Well, {a}", "rejected": f"No, {a}"}
            for i, (q, a) in enumerate(zip(questions, answers, strict=True))
        ],
    }
    for name, found in rows.items():
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in found), encoding="utf-8")
