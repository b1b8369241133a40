"""Candidates for labelling: k answers to every prompt of a file, written so that a kill loses at most one batch."""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank_rlhf.adapters import ANSWERING, adapter_file, answering_role
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.backbone.embedded import sha256_of
from lowrank_rlhf.config import Base, Data, Rollout
from lowrank_rlhf.data import Example, Renderer, Sequence
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.progress import Progress
from lowrank_rlhf.resumable import append_batch, keep_whole_batches, record_meta, refuse_other
from lowrank_rlhf.rollout import generate
from lowrank_rlhf.runs import load_run_role, recipe_base_and_data
from lowrank_rlhf.samples import is_answer_to, read_prompts, row_line


@dataclass(frozen=True)
class Sampling:
    """What to sample. The same values, prompts and model give the same file on the same machine, interrupted or not.

    Attributes:
        source: a run directory, whose policy (else sft) adapter answers, or a base model.
        k: answers to each prompt; answer i is drawn at `temperatures[i % len(temperatures)]`.
        batch_size: answers generated at a time; one of the things that determine the texts.

    Raises:
        UserError: a value out of bounds.
    """

    source: str
    prompts: str
    out: str
    k: int = 4
    temperatures: tuple[float, ...] = (1.0,)
    seed: int = 0
    batch_size: int = 32
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if not 2 <= self.k <= 9:
            raise UserError(f"--k: must be between 2 and 9, got {self.k}")
        if not 1 <= len(self.temperatures) <= self.k or not all(0 < t < math.inf for t in self.temperatures):
            raise UserError(f"--temperatures: expected 1 to k={self.k} numbers above 0, got {list(self.temperatures)}")
        for flag, value in (("batch-size", self.batch_size), ("max-new-tokens", self.max_new_tokens)):
            if value < 1:
                raise UserError(f"--{flag}: must be at least 1, got {value}")

    @property
    def answer_temperatures(self) -> list[float]:
        return [self.temperatures[i % len(self.temperatures)] for i in range(self.k)]

    @property
    def batch_prompts(self) -> int:
        """Prompts per batch: the unit of seeding and of resuming. Each temperature is a generation of its own."""
        return max(1, self.batch_size * len(set(self.answer_temperatures)) // self.k)


def sample(sampling: Sampling) -> Path:
    """Write the rows that `out` does not have yet; returns its path.

    A row is {"prompt", "responses": [k texts], "temperatures", "seed", "ended": [False where the token limit cut]}
    plus the other columns of the prompt's row.

    Raises:
        UserError: an unreadable prompts file or model, or an `out` that holds something else.
    """
    examples = read_prompts(sampling.prompts)
    base, data, role = answerer(sampling)
    out, meta = Path(sampling.out), _meta(sampling, base, role)
    refuse_other(out, meta, rows="samples")
    done = keep_whole_batches(out, examples, len(examples), sampling.batch_prompts, is_answer_to)
    if done < len(examples):
        backbone = Backbone(base)
        meta |= {f"base_{key}": value for key, value in dataclasses.asdict(backbone.info).items()}
        refuse_other(out, meta, rows="samples")
        if role is not None:
            load_run_role(backbone, sampling.source, role, role, key="RUN")
        record_meta(out, meta)
        renderer = Renderer(backbone.tokenizer, data, backbone.context)
        _write_rows(out, examples, done, sampling, backbone, role, renderer)
    print(f"sample: {out}: {sampling.k} answers to each of {len(examples)} prompts", flush=True)
    return out


def answerer(sampling: Sampling) -> tuple[Base, Data, str | None]:
    """The base to load, how prompts are rendered, and the role of the run that answers; None is the bare base."""
    folder = Path(sampling.source)
    if not (folder / "run.json").is_file():
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise UserError(f"{folder}: neither a run directory (run.json) nor a model folder (config.json)")
        data = Data(sampling.prompts, max_completion_tokens=sampling.max_new_tokens)
        return Base(model=sampling.source), data, None
    base, data = recipe_base_and_data(folder, sampling.prompts, max_completion_tokens=sampling.max_new_tokens)
    role = answering_role(folder)
    if role is None:
        raise UserError(f"{folder}: adapters/ has no {' or '.join(ANSWERING)}, so this run has nobody to answer")
    return base, data, role


def batch_seed(seed: int, first_prompt: int) -> int:
    """The seed of the batch that begins at this prompt: it depends on nothing generated before.

    >>> batch_seed(0, 8) == batch_seed(0, 8) != batch_seed(8, 0)
    True
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {first_prompt}".encode()).digest()[:7], "big")


def _write_rows(
    out: Path,
    examples: list[Example],
    done: int,
    sampling: Sampling,
    backbone: Backbone,
    role: str | None,
    renderer: Renderer,
) -> None:
    prompts = [renderer.prompt(e.prompt, e.where) for e in examples]
    who, cut = role or "base", sum(is_cut for _, is_cut in prompts)
    print(
        f"sample: {who} of {sampling.source}, {done} of {len(examples)} prompts are done; {cut} prompts cut", flush=True
    )
    line = Progress("sample", len(examples), done, unit="prompt")
    with out.open("ab") as file:
        while done < len(examples):
            group = range(done, min(done + sampling.batch_prompts, len(examples)))
            torch.manual_seed(batch_seed(sampling.seed, done))
            answers = _answers(sampling, backbone, role, renderer.stop_ids, [prompts[i][0] for i in group])
            lines = []
            for i, completions in zip(group, answers, strict=True):
                texts = [renderer.decode(c.completion_ids) for c in completions]
                ended = [not c.cut for c in completions]
                lines.append(row_line(examples[i], texts, sampling.answer_temperatures, sampling.seed, ended))
            append_batch(file, lines)
            done = group.stop
            line.step(done, sum(len(c.completion_ids) for completions in answers for c in completions))


def _answers(
    sampling: Sampling, backbone: Backbone, role: str | None, stop_ids: list[int], prompts: list[list[int]]
) -> list[list[Sequence]]:
    """k completions of each prompt, in the order of `answer_temperatures`."""
    found: dict[tuple[int, int], Sequence] = {}
    each = sampling.answer_temperatures
    for temperature in dict.fromkeys(each):
        slots = [(p, i) for p in range(len(prompts)) for i in range(sampling.k) if each[i] == temperature]
        sequences = generate(
            backbone,
            role,
            [prompts[p] for p, _ in slots],
            Rollout(batch_size=sampling.batch_size, temperature=temperature),
            max_new_tokens=sampling.max_new_tokens,
            stop_ids=stop_ids,
        )
        found.update(zip(slots, sequences, strict=True))
    return [[found[p, i] for i in range(sampling.k)] for p in range(len(prompts))]


def _meta(sampling: Sampling, base: Base, role: str | None) -> dict[str, Any]:
    return {
        "prompts_sha256": sha256_of(Path(sampling.prompts)),
        "base_model": base.model,
        "adapter_sha256": role and sha256_of(adapter_file(sampling.source, role)),
        "temperatures": sampling.answer_temperatures,
        **{key: getattr(sampling, key) for key in ("k", "seed", "batch_size", "max_new_tokens")},
    }
