"""python -m recipes.arithmetic.make_data: write the small arithmetic task, prompts with answers, beside this script.

Sums are the table from 1 to 12; of two numbers below 100 the larger or the smaller is asked for. train.jsonl and
test.jsonl share no prompt, nor a sum whose terms are exchanged. One seed draws everything: the files are the same
everywhere.
"""

import json
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
TABLE = range(1, 13)
TEST_PER_KIND = 32
ASK = "Answer with the number only."

Row = dict[str, str | int]


def questions(random: Random) -> dict[str, list[tuple[frozenset[int], Row]]]:
    """Every question of each kind, with the numbers it is about."""
    table = [(a, b) for a in TABLE for b in TABLE]
    found = {"sum": [(frozenset((a, b)), row("sum", f"What is {a} + {b}?", a + b)) for a, b in table]}
    for kind, right in (("larger", max), ("smaller", min)):
        pairs: dict[frozenset[int], tuple[int, int]] = {}
        while len(pairs) < len(table):
            a, b = random.sample(range(10, 100), 2)
            pairs.setdefault(frozenset((a, b)), (a, b))
        found[kind] = [
            (numbers, row(kind, f"Which number is {kind}, {a} or {b}?", right(a, b)))
            for numbers, (a, b) in pairs.items()
        ]
    return found


def row(kind: str, question: str, answer: int) -> Row:
    return {"prompt": f"{question} {ASK}", "answer": answer, "kind": kind}


def split(found: list[tuple[frozenset[int], Row]], random: Random) -> tuple[list[Row], list[Row]]:
    """For training and for the test, which takes all questions about some numbers."""
    order = sorted({tuple(sorted(numbers)) for numbers, _ in found})
    random.shuffle(order)
    parts: tuple[list[Row], list[Row]] = ([], [])
    for numbers in order:
        part = parts[len(parts[1]) < TEST_PER_KIND]
        part += [asked for about, asked in found if about == frozenset(numbers)]
    return parts


def main() -> None:
    random = Random(0)
    parts = [split(found, random) for found in questions(random).values()]
    train, test = ([asked for part in parts for asked in part[side]] for side in (0, 1))
    random.shuffle(train)
    for name, rows in (("train", train), ("test", test)):
        text = "".join(json.dumps(asked) + "\n" for asked in rows)
        (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{len(rows)} prompts in {HERE / name}.jsonl")


if __name__ == "__main__":
    main()
