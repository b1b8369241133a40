"""Scores from code and servers: a Python function, a built-in verifier, or whatever answers at a URL."""

import difflib
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

from lowrank_rlhf.data import Example, Renderer, Sequence
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.rewards.http import ServerReward
from lowrank_rlhf.rewards.scored import Overlap, Scored, checked_scores, column_names, plain_texts
from lowrank_rlhf.rewards.verifiers import VERIFIERS

URLS = ("http://", "https://")


class FunctionReward:
    """`fn(prompts, completions, **columns) -> list[float]`: plain texts, and the data set's other columns.

    Args:
        name: for messages.
        overlap: what may go on beside a call; by default what the function's own attribute `overlap` says, else
            `scoring`.

    Raises:
        UserError: `overlap` is not one of the three, the data lacks a column that it takes, or it returns anything but
            one finite number per completion.
        Exception: whatever the function itself raises, with a note that names it.
    """

    def __init__(self, name: str, function: Callable[..., Any], renderer: Renderer, overlap: Overlap | None = None):
        self.name, self.function, self.renderer = name, function, renderer
        self.overlap: Overlap = getattr(function, "overlap", "scoring") if overlap is None else overlap
        if self.overlap not in get_args(Overlap):
            raise UserError(
                f"reward: {name}.overlap is {self.overlap!r:.80}: expected {' or '.join(get_args(Overlap))}"
            )

    def __call__(self, examples: SequenceOf[Example], sequences: SequenceOf[Sequence]) -> Scored:
        prompts, completions, columns = plain_texts(examples, sequences, self.renderer)
        check_columns("reward", self.name, self.function, columns)
        try:
            scores = self.function(prompts, completions, **columns)
        except Exception as error:
            error.add_note(f"raised in the reward function {self.name}")
            if threading.current_thread() is not threading.main_thread():
                error.add_note("it ran in a worker thread; set its attribute overlap = 'none' if it needs the main one")
            raise
        return checked_scores(scores, len(completions), self.name)

    def check(self, examples: SequenceOf[Example]) -> None:
        """Before any rollout: the function takes these columns, and a verifier can read those of every row.

        Raises:
            UserError: it does not, or it cannot; names the row.
        """
        names = column_names(examples)
        check_columns("reward", self.name, self.function, names)
        if self.name not in VERIFIERS:
            return
        self.function([], [], **{name: [] for name in names})  # its package is there
        for e in examples:
            try:
                self.function([""], [""], **{name: [e.columns.get(name)] for name in names})
            except UserError as error:
                raise UserError(f"{e.where}: {error}") from error


def reward_function(name: str, renderer: Renderer) -> FunctionReward | ServerReward:
    """What a recipe's `reward` names: `module:function`, the URL of a reward server, or a verifier.

    Raises:
        UserError: it is none of these, cannot be imported, or nobody listens there.
    """
    if name.startswith(URLS):
        return ServerReward(name, renderer)
    if name in VERIFIERS:
        # Quick, and nothing runs beside Python that computes; math_verify's time limits need the main thread
        return FunctionReward(name, VERIFIERS[name], renderer, "none")
    if ":" in name:
        return FunctionReward(name, import_function(name), renderer)
    dotted = ":".join(name.rsplit(".", 1))
    close = [*difflib.get_close_matches(name, VERIFIERS, n=1), *([dotted] if "." in name else [])]
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UserError(
        f"reward: {name!r}: expected module:function, the URL of a reward server (http://… or https://…), or a "
        f"verifier ({', '.join(VERIFIERS)}){hint}"
    )


def import_function(name: str) -> Callable[..., Any]:
    """
    Args:
        name: `module:function`, importable from the working directory or the installed packages.

    Raises:
        UserError: it cannot be imported.
    """
    module_name, _, function_name = name.partition(":")
    if not function_name or not module_name or module_name.startswith("."):
        raise UserError(f"reward: {name!r}: write it module:function")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"reward: {name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise UserError(f"reward: {name!r} is not a function")
    return function


def short_name(name: str) -> str:
    """What metrics call a reward function: the function, the server's host, or the verifier.

    >>> short_name("my.rewards:polite"), short_name("http://localhost:8000/score"), short_name("exact_number")
    ('polite', 'localhost', 'exact_number')
    """
    if name.startswith(URLS):
        return urlsplit(name).hostname or name
    return name.rpartition(":")[2]


def check_columns(key: str, name: str, function: Callable[..., Any], columns: Iterable[str], texts: int = 2) -> None:
    """
    Args:
        key: the recipe's key or the flag that named the function.
        columns: names of the data's other columns.
        texts: how many lists of texts it takes in front.

    Raises:
        UserError: the function cannot be called with these columns.
    """
    names = list(columns)
    try:
        signature = inspect.signature(function)
    except ValueError:  # of one written in C that does not tell
        return
    try:
        signature.bind(*([[]] * texts), **{name: [] for name in names})
    except TypeError as error:
        raise UserError(f"{key}: {name}: {error}; columns of the prompts: {', '.join(names) or 'none'}") from error
