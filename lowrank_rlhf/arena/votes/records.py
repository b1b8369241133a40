"""What is kept of a comparison: who answered what under which settings, and who voted how."""

import hashlib
import json
import uuid
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

Message = dict[str, str]  # {"role": ..., "content": ...}
Choice = Literal["a", "b", "tie", "both_bad"]
Kind = Literal["pair", "ranking", "thumb", "better"]

STRENGTHS = {1: "barely", 2: "slightly", 3: "clearly", 4: "far"}  # how much better; exported as the margin
REASONS = ("helpful", "truthful", "harmless", "follows instructions", "clearer", "better length")


def new_id() -> str:
    return uuid.uuid4().hex


def now() -> str:
    """This moment in UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class Speaker:
    """The bare base, or one adapter of one run at one step, on one base.

    Attributes:
        name: in tables and exports; unique among the speakers of an app: base, sft, ppo, ppo step 20.
        run: the run's folder name, or the name given to an imported adapter; "" is the bare base.
        role: policy, sft or adapter (an imported one); "" is the bare base.
        step: of a checkpoint; None is what the run ended with.
        adapter_hash: SHA-256 of its weights file, "" for the bare base.
        base, revision, quantization: what identifies the base.
    """

    name: str
    run: str = ""
    role: str = ""
    step: int | None = None
    adapter_hash: str = ""
    base: str = ""
    revision: str | None = None
    quantization: str = ""


@dataclass(frozen=True)
class Decoding:
    """How an answer was sampled. `temperature` 0 is greedy; `system` is the system prompt, "" for none."""

    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 256
    seed: int = 0
    system: str = ""


@dataclass(frozen=True)
class Answer:
    """One answer and all that reproduces it.

    Attributes:
        prompt: the turns it answers, the last one a user's; without the system prompt, which is in `decoding`.
        tokens: of the completion, its end-of-turn token included.
        ended: False where the token limit or a stop cut it.
        milliseconds, first_token_milliseconds: from the request.
        score: of the reward model `scored_by`; None where none scored it.
        beside: names of the speakers that generated in the same batch, in its order (numerics depend on the batch).
    """

    speaker: Speaker
    decoding: Decoding
    prompt: tuple[Message, ...]
    text: str
    tokens: int = 0
    ended: bool = True
    milliseconds: int = 0
    first_token_milliseconds: int = 0
    score: float | None = None
    scored_by: str | None = None
    beside: tuple[str, ...] = ()
    id: str = field(default_factory=new_id)


@dataclass(frozen=True)
class Comparison:
    """Answers in the order in which they were shown (A, B, …); 1 for a thumb, 2 for a pair, 2 to 9 for a ranking.

    Attributes:
        blind: whether names were hidden until the vote.
        annotator: to whom it was shown; nobody else's vote on it is taken.
        repeat_of: the comparison that this shows again with sides swapped, to measure consistency.
    """

    answers: tuple[Answer, ...]
    annotator: str
    blind: bool
    repeat_of: str | None = None
    created: str = field(default_factory=now)
    id: str = field(default_factory=new_id)

    @property
    def prompt(self) -> tuple[Message, ...] | None:
        """The turns that all of them answer, None where they differ (columns that went different ways)."""
        first = self.answers[0].prompt
        return first if all(answer.prompt == first for answer in self.answers) else None


@dataclass(frozen=True)
class Vote:
    """One judgement of one comparison; a later one of the same annotator, comparison, kind and answer supersedes it.

    Attributes:
        choice: of a pair.
        strength: of a pair won by a or b, 1 to 4; see `STRENGTHS`.
        ranking: of a ranking, one rank per shown answer, 1 is best, equal ranks are ties.
        up: of a thumb.
        answer: id of the answer that a thumb is about, or that a better answer improves.
        text: of a better answer, what the annotator wrote.
        reasons: of `REASONS`.
        milliseconds: from showing the finished answers to the vote.
        supersedes: id of the vote this one replaces.
        withdrawn: this only takes `supersedes` back (undo).
    """

    comparison: str
    annotator: str
    kind: Kind
    choice: Choice | None = None
    strength: int | None = None
    ranking: tuple[int, ...] = ()
    up: bool | None = None
    answer: str | None = None
    text: str | None = None
    reasons: tuple[str, ...] = ()
    comment: str = ""
    milliseconds: int = 0
    supersedes: str | None = None
    withdrawn: bool = False
    created: str = field(default_factory=now)
    id: str = field(default_factory=new_id)


@dataclass(frozen=True)
class Judged:
    """A comparison with the votes on it that stand: neither superseded nor withdrawn."""

    comparison: Comparison
    votes: tuple[Vote, ...]


def prompt_key(prompt: tuple[Message, ...]) -> str:
    """Equal for equal prompts; what splits and bootstraps go by."""
    return hashlib.sha256(json.dumps(prompt, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def as_json(record: Any) -> str:
    return json.dumps(asdict(record), ensure_ascii=False)
