"""The data card of an export: what is in it, who judged, what was left out, how it is read."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lowrank_rlhf.arena.votes.counting import counted
from lowrank_rlhf.arena.votes.records import STRENGTHS

if TYPE_CHECKING:
    from lowrank_rlhf.arena.votes.exports import ExportReport

FORMATS = {
    "preference": "prompt, chosen, rejected, margin: which of two answers is better",
    "ranking": "prompt, responses, ranking: 1 is the best, equal ranks are ties",
    "unpaired": "prompt, completion, label: thumbs up (true) and down, and both answers of a vote for neither",
    "demonstrations": "prompt, completion: answers that annotators wrote",
    "prompts": "prompt: every prompt above, once",
}
STAGES = {"preference": "`reward`, `dpo`, `orpo`", "ranking": "`reward`, `dpo`, `orpo`", "unpaired": "`kto`"}
STAGES |= {"demonstrations": "`sft`", "prompts": "`ppo`, `grpo`"}


def data_card(report: "ExportReport") -> str:
    """Markdown that a data hub reads too: its header names the files of each configuration."""
    return "\n".join([*_header(report), *_summary(report), *_files(report), *_left_out(report), *_columns()]) + "\n"


def _kinds(report: "ExportReport") -> Iterator[tuple[str, dict[str, int]]]:
    for kind in FORMATS:
        rows = {side: report.files.get(f"{kind}_{side}.jsonl", 0) for side in ("train", "test")}
        if any(rows.values()):
            yield kind, rows


def _header(report: "ExportReport") -> Iterator[str]:
    yield "---"
    yield "configs:"
    for kind, rows in _kinds(report):
        yield f"- config_name: {kind}"
        yield "  data_files:"
        yield from (f"  - split: {side}\n    path: {kind}_{side}.jsonl" for side, count in rows.items() if count)
    yield "---"


def _summary(report: "ExportReport") -> Iterator[str]:
    first, last = (date[:10] for date in report.dates)
    settings = report.settings
    yield "# Votes"
    yield ""
    when = first if first == last else f"{first} to {last}"
    who = counted(report.annotators, "person", "people")
    yield f"{counted(report.votes, 'vote')} by {who}, {when}, on the answers of language models; {report.blind} of them"
    yield "were blind, the others were given with the names in sight or come from a file that does not say."
    yield f"Annotators are {'named' if settings['names'] else 'numbered in the order of their first vote: a1, a2 …'}."
    yield ""
    yield "| model | answers judged |"
    yield "|---|---|"
    yield from (f"| {_cell(name)} | {count} |" for name, count in sorted(report.models.items()))
    if report.strengths:
        said = ", ".join(f"{STRENGTHS[strength]} ({strength}) {n}" for strength, n in report.strengths.items())
        yield f"\nHow much better: {said}."
    if report.reasons:
        yield f"\nReasons given: {', '.join(f'{reason} {n}' for reason, n in sorted(report.reasons.items()))}."


def _files(report: "ExportReport") -> Iterator[str]:
    prompts, settings = report.prompts, report.settings
    yield ""
    yield "| rows of | train | test | trained on by | columns |"
    yield "|---|---|---|---|---|"
    for kind, rows in _kinds(report):
        yield f"| {kind} | {rows['train']} | {rows['test']} | {STAGES[kind]} | {FORMATS[kind]} |"
    yield ""
    yield f"Split by prompt (the first question of a conversation): {prompts['train']} in train, {prompts['test']} in"
    yield f"test, the same ones in every file; share {settings['eval_fraction']:g}, seed {settings['seed']}. A file"
    yield "without rows is not written."


def _left_out(report: "ExportReport") -> Iterator[str]:
    if report.left_out:
        yield "\n| votes left out | why |"
        yield "|---|---|"
        yield from (f"| {count} | {why} |" for why, count in sorted(report.left_out.items()))


def _columns() -> Iterator[str]:
    yield ""
    yield "`prompt` is a list of messages, with the system prompt where the models had one; answers are lists of one"
    yield "message. `margin` is the strength of the vote, 1.0 where it has none, also of a written answer over the one"
    yield "that it improves. `prompt_key` is equal for equal prompts; `chosen_model`, `rejected_model`, `model` and"
    yield "`models` say who answered, `human` is an annotator."


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
