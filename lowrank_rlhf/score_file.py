"""Reward scores for a data file: every row as it is, and what the reward model of a run says of its answers.

One row is in memory at a time, and one batch. A row keeps its columns and gets

score                            of `prompt` with `completion`, and of every other format that shows one answer
scores                           of `prompt` with `responses`, as `lowrank-rlhf sample` writes them; a list
chosen_score, rejected_score     of preferences
disagreement                     of an ensemble: the standard deviation over its members, in the same shapes
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.backbone.embedded import sha256_of
from lowrank_rlhf.backbone.store import HEAD, WEIGHTS
from lowrank_rlhf.config import Base, Data, RewardSource
from lowrank_rlhf.data import Example, Renderer
from lowrank_rlhf.data.examples import Messages
from lowrank_rlhf.data.fields import Row, answer, prompt, sequence
from lowrank_rlhf.data.files import read_rows, source_hash
from lowrank_rlhf.data.formats import FORMATS, detect_format
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.progress import progress
from lowrank_rlhf.resumable import append_batch, keep_whole_batches, record_meta, refuse_other
from lowrank_rlhf.rewards import AdapterReward, Scored, load_members, members_line, reward_source, saved_members
from lowrank_rlhf.runs import recipe_base_and_data

RESPONSES = "responses"  # the format of a row with several answers, ranked or not
Shape = Literal["one", "several", "pair"]


@dataclass(frozen=True)
class ScoreFile:
    """What to score. The same values, rows and run give the same file on the same machine, interrupted or not.

    Attributes:
        run: a reward run.
        source: the data, in any format that shows an answer.
        combine, std_coef: of an ensemble's members, as in `reward_from`.
        batch_size: rows of a batch and texts of a forward; one of the things that determine the last bits.

    Raises:
        UserError: a value out of bounds, or one that would change nothing.
    """

    run: str
    source: str
    out: str
    combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    batch_size: int = 16
    std_coef: float = 1.0

    def __post_init__(self) -> None:
        self.reward_source()
        if self.batch_size < 1:
            raise UserError(f"--batch-size: must be at least 1, got {self.batch_size}")

    def reward_source(self) -> RewardSource:
        return reward_source(self.run, self.combine, self.std_coef)


@dataclass(frozen=True)
class Answered:
    """A row and the answers it shows.

    Attributes:
        line: the row as JSON.
        shape: which columns its scores become.
    """

    where: str
    line: bytes
    prompt: Messages
    answers: list[Messages]
    shape: Shape


def score_file(options: ScoreFile) -> Path:
    """Write the rows that `out` does not have yet; returns its path.

    Scores are those of PPO's reward on `Renderer.sequence`, with the template and the token limits of the run's
    recipe. So every answer ends with its end-of-turn token, also one that sampling cut.

    Raises:
        UserError: not a reward run; an unreadable file; a row that does not fit; or an `out` that holds something else.
    """
    base, data = recipe_base_and_data(Path(options.run), options.source)
    out, meta = Path(options.out), _weights(options.run)
    total = sum(1 for _ in progress(read_answered(options.source), f"reading {options.source}"))
    meta |= _meta(options, base, data)
    refuse_other(out, meta, rows="scores")
    done = keep_whole_batches(out, read_answered(options.source), total, options.batch_size, _is_scored)
    if done < total:
        backbone = Backbone(base)
        meta |= {f"base_{key}": value for key, value in dataclasses.asdict(backbone.info).items()}
        refuse_other(out, meta, rows="scores")
        reward = AdapterReward(
            backbone,
            load_members(backbone, options.run, "reward", key="RUN"),
            options.reward_source(),
            options.batch_size,
        )
        print(f"score: {members_line(backbone, reward.roles)}", flush=True)
        record_meta(out, meta)
        _write_rows(options, reward, Renderer(backbone.tokenizer, data, backbone.context), done, total)
    print(f"score: {out}: {total} rows, scored by {options.run}", flush=True)
    return out


def read_answered(source: str) -> Iterator[Answered]:
    """The rows of a source one by one; the first one's columns decide the format of all.

    Raises:
        UserError: a row that does not fit, has no answer, or has a column that scoring writes; or there is no row.
    """
    format = ""
    for where, row in read_rows(source):
        if isinstance(row, UserError):
            raise row
        format = format or (RESPONSES if {"prompt", RESPONSES} <= set(row) else detect_format(row, where))
        yield _answered(row, where, format)
    if not format:
        raise UserError(f"{source}: the file has no rows")


def score_columns(shape: Shape, scores: list[float], disagreement: list[float] | None) -> Row:
    """What a row gets: scores and, of an ensemble, disagreements, one per answer.

    >>> score_columns("pair", [2.0, 1.5], None)
    {'chosen_score': 2.0, 'rejected_score': 1.5}
    """
    named = {"score": scores} if disagreement is None else {"score": scores, "disagreement": disagreement}
    columns: Row = {}
    for name, values in named.items():
        if shape == "one":
            columns[name] = values[0]
        elif shape == "several":
            columns["scores" if name == "score" else name] = values
        else:
            columns |= {f"chosen_{name}": values[0], f"rejected_{name}": values[1]}
    return columns


def _answered(row: Row, where: str, format: str) -> Answered:
    shape: Shape = "one"
    if format == RESPONSES:
        asked, shape = prompt(row, "prompt", where), "several"
        said = enumerate(sequence(row, RESPONSES, where), start=1)
        answers = [answer({f"responses[{i}]": text}, f"responses[{i}]", where, asked, empty=True) for i, text in said]
    else:
        example = FORMATS[format].parse(row, where)
        asked, answers = example.prompt, [turns for turns in (example.chosen, example.rejected) if turns is not None]
        if len(answers) == 2:
            shape = "pair"
        if not answers:
            raise UserError(
                f"{where}: there is no answer to score, this is a prompt alone (format {format}); "
                "give prompt and completion, prompt and responses, or preferences"
            )
    if taken := row.keys() & score_columns(shape, [0.0, 0.0], [0.0, 0.0]).keys():
        raise UserError(f"{where}: scoring writes a column {min(taken)!r} itself; rename or drop this one")
    return Answered(where, _line(row, where), asked, answers, shape)


def _line(row: Row, where: str) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError) as error:  # a date of a Parquet file; half of a surrogate pair
        raise UserError(f"{where}: cannot be written as JSON: {error}; convert or drop this column") from error


def _is_scored(line: bytes, row: Answered) -> bool:
    if not line.startswith(row.line[:-1] + b", "):
        return False
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _write_rows(options: ScoreFile, reward: AdapterReward, renderer: Renderer, done: int, total: int) -> None:
    print(f"score: {done} of {total} rows are done", flush=True)
    rows = progress(itertools.islice(read_answered(options.source), done, None), "scoring", total - done)
    cut = texts = 0
    with Path(options.out).open("ab") as file:
        # Batches begin at fixed rows: in 4 bit the last digits of a score depend on the texts beside it
        while batch := list(itertools.islice(rows, options.batch_size)):
            flat = [(row, turns) for row in batch for turns in row.answers]
            sequences = [renderer.sequence(row.prompt, turns, row.where) for row, turns in flat]
            scored = reward([Example(row.where, row.prompt) for row, _ in flat], sequences)
            for (row, _), score in zip(flat, scored.scores, strict=True):
                if not math.isfinite(score):
                    raise UserError(f"{row.where}: its score is {score}; is the adapter of {options.run} damaged?")
            append_batch(file, _scored_lines(batch, scored, is_ensemble=len(reward.roles) > 1))
            cut, texts = cut + sum(s.cut for s in sequences), texts + len(sequences)
    print(f"score: {cut} of {texts} texts cut to the recipe's token limits", flush=True)


def _scored_lines(batch: list[Answered], scored: Scored, *, is_ensemble: bool) -> Iterator[bytes]:
    scores, disagreement = iter(scored.scores), iter(scored.disagreement)
    for row in batch:
        own = list(itertools.islice(scores, len(row.answers)))
        spread = list(itertools.islice(disagreement, len(row.answers)))
        columns = score_columns(row.shape, own, spread if is_ensemble else None)
        yield row.line[:-1] + b", " + json.dumps(columns).encode()[1:] + b"\n"


def _weights(run: str) -> dict[str, Any]:
    """Hashes of the run's reward adapters and heads."""
    folders = [Path(run, "adapters", member) for member in saved_members(run)]
    for folder in folders:
        for name in (WEIGHTS, HEAD):
            if not (folder / name).is_file():
                raise UserError(f"RUN: {folder} has no {name}; is {run} a finished reward run?")
    return {"adapters_sha256": [sha256_of(folder / name) for folder in folders for name in (WEIGHTS, HEAD)]}


def _meta(options: ScoreFile, base: Base, data: Data) -> dict[str, Any]:
    return {
        "rows_sha256": source_hash(options.source),
        "base_model": base.model,
        "combine": options.combine,
        "std_coef": options.std_coef,
        "batch_size": options.batch_size,
        **{key: getattr(data, key) for key in ("prompt_template", "max_prompt_tokens", "max_completion_tokens")},
    }
