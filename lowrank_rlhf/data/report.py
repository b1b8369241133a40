"""What is in the data, said before training: rows, token lengths, cuts, duplicates, leakage, three rendered rows."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from lowrank_rlhf.data.duplicates import count_contradictions, count_duplicates
from lowrank_rlhf.data.examples import Example, Examples
from lowrank_rlhf.data.rendering import Renderer
from lowrank_rlhf.data.tokenized import Sizes
from lowrank_rlhf.progress import progress

PERCENTILES = (5, 50, 95, 99, 100)
SHOWN_ROWS = 3
SHOWN_CHARACTERS = 400

Kind = Literal["demonstrations", "preferences", "thumbs", "prompts"]
Segments = list[tuple[str, bool]]  # text, and whether it is learned


def data_report(kind: Kind, train: Examples, held_out: Examples, renderer: Renderer, sizes: Sizes) -> dict[str, Any]:
    """The report as plain values, for run.json; `print_report` says it.

    Args:
        kind: what the stage makes of the examples.
        train: what it learns from.
        held_out: what it is judged on.
        renderer: of this base.
        sizes: of the train examples.
    """
    readings = {id(e.reading): e.reading for e in (train, held_out) if e.reading.rows}
    exact, near = count_duplicates(_texts(train, kind))
    judged = train if kind in ("preferences", "thumbs") else ()
    pairs = train if kind == "preferences" else ()
    contradicting, _ = count_contradictions(progress(pairs, "looking for contradictions", len(pairs)))
    return {
        "kind": kind,
        "sources": [dataclasses.asdict(reading) for reading in readings.values()],
        "examples": {"train": len(train), "eval": len(held_out)},
        "tokens": {"prompt": percentiles(sizes.prompt), "completion": percentiles(sizes.completion)},
        "texts": len(sizes.prompt),
        "truncated": sizes.cut,
        "duplicates": {"exact": exact, "near": near},
        "equal_pairs": 0,  # the stage knows, which tokenises pairs
        "contradicting_pairs": contradicting,
        "empty_answers": empty_answers(judged),
        "leaked": leaked_prompts(train, held_out),
        "template_date": renderer.template_date,
        "rendered": [{"row": where, "text": text} for where, text in _rendered(kind, train, renderer)],
    }


def percentiles(counts: Iterable[int]) -> dict[str, int]:
    """
    >>> percentiles(range(1, 101))
    {'5': 5, '50': 50, '95': 95, '99': 99, 'max': 100}
    """
    values = np.fromiter(counts, np.int64)
    if not values.size:
        return {}
    found = np.percentile(values, PERCENTILES, method="inverted_cdf")
    return {"max" if p == 100 else str(p): int(value) for p, value in zip(PERCENTILES, found, strict=True)}


def leaked_prompts(train: Iterable[Example], held_out: Iterable[Example]) -> int:
    """How many distinct held-out prompts are also in train, whatever their case and spacing."""
    return len({_prompt_digest(e) for e in held_out} & {_prompt_digest(e) for e in train})


def empty_answers(judged: Iterable[Example]) -> int:
    """How many answers say nothing; one that is in several pairs of its row counts once."""
    answers = ((e.where, side) for e in judged for side in (e.chosen, e.rejected) if side is not None)
    return len({(where, repr(side)) for where, side in answers if not any(turn["content"].strip() for turn in side)})


def _prompt_digest(example: Example) -> bytes:
    text = " ".join(" ".join([m["role"], m["content"]]) for m in example.prompt)
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=8).digest()


def _texts(examples: Examples, kind: Kind) -> Iterator[str]:
    """One text a row: the pairs of a ranked row would count as near duplicates of each other."""
    last = None
    for example in progress(examples, "looking for duplicates", len(examples)):
        if example.where != last:
            answers = [] if kind == "prompts" else [*(example.chosen or []), *(example.rejected or [])]
            yield "\n".join(m["content"] for m in [*example.prompt, *answers])
        last = example.where


def _rendered(kind: Kind, examples: Examples, renderer: Renderer) -> Iterator[tuple[str, Segments]]:
    for e in examples[:SHOWN_ROWS]:
        if kind == "prompts":
            ids, _ = renderer.prompt(e.prompt, e.where)
            yield e.where, segments(renderer, ids, [False] * len(ids))
        elif kind == "demonstrations":
            row = renderer.demonstration(e.prompt, e.chosen or [], e.where)
            yield e.where, segments(renderer, row.input_ids, row.completion_mask)
        else:
            for side, answer in (("chosen", e.chosen), ("rejected", e.rejected)):
                if answer is not None:
                    sequence = renderer.sequence(e.prompt, answer, e.where)
                    mask = [False] * len(sequence.prompt_ids) + [True] * len(sequence.completion_ids)
                    yield f"{e.where}, {side}", segments(renderer, sequence.ids, mask)


def segments(renderer: Renderer, ids: list[int], mask: list[bool]) -> Segments:
    """Token ids as text, special tokens included, cut where learned and other tokens meet."""
    groups = itertools.groupby(zip(ids, mask, strict=True), key=lambda token: token[1])
    return [(renderer.text([i for i, _ in tokens]), learned) for learned, tokens in groups]


def print_report(report: dict[str, Any]) -> None:
    """Say a report; learned text in green and the rest dim on a terminal, else learned text between ⟦ and ⟧."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in report_lines(report):
        console.print(line, markup=False)
    for row in report["rendered"]:
        text = Text()
        for said, learned in row["text"]:
            said = _shortened(said) if not learned else said
            plain = f"⟦{said}⟧" if learned and not console.is_terminal else said
            text.append(plain.replace("\x1b", "␛"), style="green" if learned else "dim")
        console.print(f"— {row['row']}", markup=False)
        console.print(text)


def report_lines(report: dict[str, Any]) -> Iterator[str]:
    """The report without its rendered rows."""
    for source in report["sources"]:
        columns = ", ".join(source["columns"])
        yield f"data: {source['source']}: {source['rows']} rows, format: {source['format']}, from columns {columns}"
        if source["skipped"]:
            yield f"  {source['skipped']} of {source['rows']} rows skipped: " + "\n    ".join(source["reasons"])
    yield f"  {report['examples']['train']} {report['kind']} to learn from, {report['examples']['eval']} held out"
    for name, found in report["tokens"].items():
        if found.get("max"):
            shown = ", ".join(f"{p if p == 'max' else p + ' %'} {count}" for p, count in found.items())
            yield f"  tokens per {name}: {shown}"
    if report["template_date"]:
        yield f"  the chat template writes the date of the day: {report['template_date']} here, whenever it is"
    cut, texts = report["truncated"], report["texts"]
    yield f"  {cut} of {texts} texts cut to data.max_prompt_tokens or data.max_completion_tokens"
    duplicates, leaked = report["duplicates"], report["leaked"]
    yield f"  duplicates: {duplicates['exact']} exact, {duplicates['near']} near"
    if report["equal_pairs"]:
        yield f"  pairs that are the same tokens once cut, and teach nothing: {report['equal_pairs']}"
    if report["contradicting_pairs"]:
        yield f"  pairs that contradict another one (the two answers swapped): {report['contradicting_pairs']}"
    if report["empty_answers"]:
        yield f"  answers that say nothing, learned as they are: {report['empty_answers']}"
    yield f"  held-out prompts that are also in train: {leaked}{' (their scores are too good)' if leaked else ''}"


def _shortened(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= 2 * half else f"{text[:half]} […] {text[-half:]}"
