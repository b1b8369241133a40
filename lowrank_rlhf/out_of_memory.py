"""Where memory runs out: the same work in smaller pieces, which is said, and remembered for the rest of the run.

Nothing but the rows of a forward is ever made smaller. A micro-batch that does not fit keeps its loss: its rows go
through the model piece by piece without their activations, which backward recomputes a piece at a time (Gao et al.
2021, arXiv:2101.06983, with torch's checkpointing). So a loss that is a mean, a sorted transport or has a KL over all
rows of the micro-batch stays what it was, and the gradient of the step is the same sum.
"""

import gc
import sys
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowrank_rlhf import processes
from lowrank_rlhf.errors import UserError

T = TypeVar("T")

LEARN, SCORE, GENERATE = "learn", "score", "generate"
WORDS = {LEARN: "a forward and backward", SCORE: "a forward without gradient", GENERATE: "generating"}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python says in one of its many ways that memory is used up.

    >>> is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"))
    True
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


class MostRows:
    """The most rows that each kind of work was found to have room for; without a limit until memory runs out.

    Args:
        stage: stands in front of what is printed. None lets every error through: only a stage goes on in pieces.
        unit: rows that one of `train.micro_batch_size` is; None where it is not a number of rows, or where another one
            would be another loss, so that it is not advised.
        generation_key: the recipe's key for how many completions are generated at a time, where it has one.

    >>> most = MostRows("sft")
    >>> most.rows[LEARN] = 2
    >>> most.pieces(LEARN, 5), most.pieces(SCORE, 5)
    ([slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)], [slice(0, 5, None)])
    """

    def __init__(self, stage: str | None = None, *, unit: int | None = 1, generation_key: str | None = None):
        self.stage, self.unit, self.generation_key = stage, unit, generation_key
        self.rows: dict[str, int] = {}

    def of(self, rows: int, *works: str) -> int:
        """`rows`, or as many as there is room for in each of these works."""
        return min([rows, *(self.rows[work] for work in works if work in self.rows)])

    def pieces(self, work: str, rows: int) -> list[slice]:
        """`rows` cut so that there is room for each."""
        size = self.of(rows, work)
        return [slice(first, min(rows, first + size)) for first in range(0, rows, size)]

    def each(self, work: str, rows: int, do: Callable[[slice], T]) -> list[T]:
        """What `do` gives of each piece of the rows; a piece for which memory runs out is done again, cut in two."""
        found: list[T] = []
        done = 0
        while done < rows:
            left = rows - done

            def next_piece(first: int = done, left: int = left) -> tuple[T, int]:
                piece = slice(first, first + self.of(left, work))
                return do(piece), piece.stop

            result, done = self.again(work, left, next_piece)
            found.append(result)
        return found

    def again(self, work: str, rows: int, do: Callable[[], T], learned: SequenceOf[Tensor] = ()) -> T:
        """`do()`; where memory runs out, once more with half as many rows, as if nothing had happened.

        Random states and the gradients of `learned` are then what they were before. Whatever else `do` changes it has
        to change last.

        Raises:
            UserError: memory runs out for a single row.
        """
        if self.stage is None:
            return do()
        while True:
            random_state, gradients = _random_state(), [parameter.grad for parameter in learned]
            for parameter in learned:
                parameter.grad = None  # a backward that breaks off leaves some of its own
            try:
                result = do()
            except (RuntimeError, MemoryError) as error:
                _put_back(learned, gradients)
                if not is_out_of_memory(error):
                    raise
            else:
                _add(learned, gradients)
                return result
            # Only here, where the error has let go of its frames, are the tensors of the attempt free
            del gradients
            _free()
            _set_random_state(random_state)
            self._halve(work, rows)

    def _halve(self, work: str, rows: int) -> None:
        tried = self.of(rows, work)
        if tried <= 1:
            raise UserError(
                f"{self.stage}: out of memory in {WORDS[work]} of one row: lower data.max_prompt_tokens or "
                "data.max_completion_tokens, set train.gradient_checkpointing: true where it is not, or take a "
                "smaller base.model"
            )
        size = self.rows[work] = (tried + 1) // 2
        price = ", which changes nothing but the speed"
        key = f"train.micro_batch_size={max(1, size // self.unit)}" if self.unit else None
        if work == GENERATE:
            price = ": the same policy, slower, and where it samples other draws"
            key = self.generation_key and f"{self.generation_key}={size}"
        said = f"out of memory in {WORDS[work]} of {tried} rows; from now on {size} at a time{price}"
        stdout = sys.stdout if processes.is_main() else sys.stderr  # only the main process's stdout is shown
        print(f"{self.stage}: {said}{f'; {key} avoids the failed attempt' if key else ''}", file=stdout, flush=True)

    def state_dict(self) -> dict[str, int]:
        """The smallest of all processes', each of which is to ask."""
        parts = processes.gather(self.rows)
        return {work: min(part[work] for part in parts if work in part) for part in parts for work in part}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.rows.update(state)


def _put_back(parameters: SequenceOf[Tensor], gradients: SequenceOf[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def _add(parameters: SequenceOf[Tensor], gradients: SequenceOf[Tensor | None]) -> None:
    """The gradients of before and now, added as backward adds them."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)


def _free() -> None:
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()


def _random_state() -> tuple[Tensor, Any]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_random_state(state: tuple[Tensor, Any]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
