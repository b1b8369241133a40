"""Verifiers of packages that are installed only where they are wanted: mathematics, and the tasks of reasoning-gym."""

import functools
import importlib
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowrank_rlhf.errors import UserError

TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
MATHEMATICS = re.compile(r"\$|\\boxed|\\\(|\\\[")  # what math-verify reads LaTeX between


def math_verify(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any], **columns: Any
) -> list[float]:
    """Whether a completion is mathematically its row's `answer`, by the package math-verify: 1/2 is \\frac{2}{4}.

    Of a completion it reads what is in \\boxed{}, else LaTeX between $…$, else the last number or expression.

    Args:
        answer: a number, or an expression in LaTeX or plain text, with or without $…$ around it. Shape (B,).

    Raises:
        UserError: the package is not installed, or an answer is nothing that it can read.
    """
    package = _installed("math_verify", "math-verify", "math")
    # Its limits of time use a signal, which only the main thread may set
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    scores = []
    for text, value in zip(completions, answer, strict=True):
        readable = isinstance(value, str | int | float) and not isinstance(value, bool)
        gold = str(value) if MATHEMATICS.search(str(value)) else f"${value}$"
        right = package.parse(gold, parsing_timeout=seconds) if readable else []
        if not right:
            raise UserError(f"math_verify: the column 'answer' holds no mathematics: {value!r:.80}")
        found = package.parse(text, parsing_timeout=seconds)
        scores.append(float(package.verify(right, found, timeout_seconds=seconds)))
    return scores


def reasoning_gym(
    prompts: Sequence[str],
    completions: Sequence[str],
    answer: Sequence[Any],
    task: Sequence[Any],
    config: Sequence[Any],
    index: Sequence[Any],
    **columns: Any,
) -> list[float]:
    """What the package reasoning-gym gives for a completion, from 0 to 1: many of its tasks have several right answers.

    Scored is what stands between the last <answer> and </answer>, else the whole completion. The rows are those that
    recipes/reasoning_gym_task.py writes: the task is made again from them.

    Args:
        answer: one that is right. Shape (B,).
        task: the name of the task. Shape (B,).
        config: its settings, with `seed` and `size`. Shape (B,).
        index: which question of it the row is. Shape (B,).

    Raises:
        UserError: the package is not installed, or makes another question of the row than the one it was written from.
    """
    _installed("reasoning_gym", "reasoning-gym", "gym")
    scores = []
    for text, right, name, settings, i in zip(completions, answer, task, config, index, strict=True):
        made = _task(name, json.dumps(settings, sort_keys=True))
        if not isinstance(i, int) or not 0 <= i < len(made):
            raise UserError(f"reasoning_gym: the column 'index' holds {i!r:.80}: expected 0 to {len(made) - 1}")
        entry = made[i]
        if entry["answer"] != right:
            raise UserError(
                f"reasoning_gym: the installed version gives question {i} of {name} the answer "
                f"{entry['answer']!r:.60}, not {right!r:.60}: write the rows again with recipes/reasoning_gym_task.py"
            )
        tagged = TAGGED.findall(text)
        scores.append(float(made.score_answer((tagged[-1] if tagged else text).strip(), entry)))
    return scores


def task_rows(name: str, rows: int, seed: int, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The questions of a task of reasoning-gym, as rows that `reasoning_gym` scores.

    Args:
        settings: the task's own.

    Raises:
        UserError: the package is not installed, has no such task, or the task refuses its settings.
    """
    config = {**settings, "seed": seed, "size": rows}
    made = _task(name, json.dumps(config, sort_keys=True))
    for index in range(rows):
        entry = made[index]
        yield {
            "prompt": entry["question"],
            "answer": entry["answer"],
            "task": name,
            "config": config,
            "index": index,
        }


@functools.lru_cache(maxsize=8)
def _task(name: Any, config: str) -> Any:
    package = _installed("reasoning_gym", "reasoning-gym", "gym")
    try:
        return package.create_dataset(name, **json.loads(config))
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"reasoning_gym: the task {name!r:.80} cannot be made: {error}") from error


def _installed(module: str, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{module}: needs the package {package} ({error}): pip install {package}, or this project with [{extra}]"
        ) from error
