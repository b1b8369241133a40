"""The one base model of the app: speakers that answer side by side in one batch, and rewards that score them.

Everything that touches the model runs on one thread of its own, one caller at a time in the order in which they came.
Whatever ends a generation (its end, a stop, a closed iterator, an error, memory that is used up) leaves no adapter on,
no hook and no cache: the next one equals that of a fresh process.
"""

import gc
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from lowrank_rlhf.arena.chat.adapters import Adapters
from lowrank_rlhf.arena.chat.catalog import Catalog, Found, unknown
from lowrank_rlhf.arena.chat.decoding import Batch, Row
from lowrank_rlhf.arena.chat.prompts import Prompts, checked_decoding
from lowrank_rlhf.arena.chat.turns import Turns
from lowrank_rlhf.arena.votes.records import Decoding, Message, Speaker
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.out_of_memory import is_out_of_memory
from lowrank_rlhf.scoring import score_sequences

Result = TypeVar("Result")
NOBODY = Speaker("")


@dataclass(frozen=True)
class Request:
    """What one speaker is asked: the turns so far, the last one a user's, without the system prompt of `decoding`."""

    speaker: str
    messages: list[Message]
    decoding: Decoding = field(default_factory=Decoding)


@dataclass(frozen=True)
class Progress:
    """One answer so far.

    Attributes:
        tokens: generated, the end-of-turn token included.
        milliseconds, first_token_milliseconds: from the request, the time until the model was free included.
        done: it does not grow any more, because it `ended` by itself, was `stopped`, or reached `max_new_tokens`.
        speaker: who wrote it, with the hash of the weights that did; nobody where it was stopped while waiting.
    """

    text: str = ""
    tokens: int = 0
    milliseconds: int = 0
    first_token_milliseconds: int = 0
    done: bool = False
    ended: bool = False
    stopped: bool = False
    speaker: Speaker = NOBODY

    @property
    def tokens_per_second(self) -> float:
        """Of writing, without the time until the first token; 0 before the second."""
        took = self.milliseconds - self.first_token_milliseconds
        return (self.tokens - 1) * 1000 / took if took > 0 and self.tokens > 1 else 0.0


class Engine:
    """Generates and scores for everybody; loads the base when it is first needed.

    Args:
        catalog: who there is; `rescan` puts a newer one in its place when runs have appeared.
        device: where the base goes.
        max_adapters: on the base at a time; the ones not used for longest leave.

    Attributes:
        catalog: as given.
        waiting: callers that use the model or wait for it.
    """

    def __init__(self, catalog: Catalog, *, device: str = "auto", max_adapters: int = 6):
        self.catalog, self.device, self.max_adapters = catalog, device, max_adapters
        self._turns = Turns()
        self._choosing = threading.Lock()
        self._pinned: Catalog | None = None  # the one whose base is loaded, from when its loading starts
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._backbone: Backbone | None = None
        self._adapters: Adapters | None = None
        self._prompts: Prompts | None = None

    @property
    def waiting(self) -> int:
        return self._turns.waiting

    @property
    def loaded(self) -> bool:
        """Whether the base is in memory."""
        return self._prompts is not None

    def rescan(self, look: Callable[[Catalog | None], Catalog]) -> Catalog:
        """Put a newer catalog in the place of this one.

        Args:
            look: scans; it is given the catalog whose base is loaded or being loaded, and must stay on that. None
                leaves it free to choose.
        """
        with self._choosing:
            self.catalog = look(self._pinned)
            return self.catalog

    def load(self) -> None:
        """Load the base now, so that the first answer need not wait for it."""
        with self._turns.one():
            self._do(self._loaded)

    def stream(self, requests: Sequence[Request], stop: Callable[[], bool] = lambda: False) -> Iterator[list[Progress]]:
        """All requests answer at once; one list, in their order, for each token step.

        Close the iterator, or let `stop` say True, to end it early: what was written so far then is the last list.

        Args:
            requests: one or more; each has its own speaker, turns, sampling and seed.
            stop: asked before each step, and while another generation has the model.

        Raises:
            UserError: a request cannot be answered, in words, and what to do about it. Nothing stays behind.
        """
        started = time.perf_counter()
        found = [self._found(request.speaker) for request in requests]
        if not found:
            raise UserError("nobody to answer: choose a model")
        for request in requests:
            checked_decoding(request.decoding)
        turn = self._turns.take(stop)
        answers = [Progress() for _ in requests]
        if turn is None:
            yield [replace(answer, done=True, stopped=True) for answer in answers]
            return
        batch: Batch | None = None
        try:
            rows, batch, speakers = self._do(lambda: self._begin(requests, found))
            answers = [Progress(speaker=speaker) for speaker in speakers]
            while batch.rows and not stop():
                if self._do(batch.step):
                    answers = self._progress(answers, rows, started)
                    yield answers
            if not all(answer.done for answer in answers):
                yield [answer if answer.done else replace(answer, done=True, stopped=True) for answer in answers]
        finally:
            if batch is not None:
                batch.close()
            self._turns.leave(turn)

    def score(self, reward: str, prompt: Sequence[Message] | str, text: str, system: str = "") -> float:
        """What a reward run says of an answer, as PPO's reward would; of an ensemble the mean.

        Args:
            reward: a name in `catalog.rewards`.
            prompt: the turns that `text` answers, or the user's one.

        Raises:
            UserError: no such run, one of another base, or a text too long for it.
        """
        if reward not in self.catalog.rewards:
            known = ", ".join(self.catalog.rewards) or "none"
            raise UserError(f"no reward run {reward!r} here; there are: {known}")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        with self._turns.one():
            return self._do(lambda: self._score(self.catalog.rewards[reward], messages, text, system))

    @property
    def backbone(self) -> Backbone:
        """The base, loaded; only between generations is it nobody's."""
        return self._loaded()[0]

    # On the model's thread

    def _loaded(self) -> tuple[Backbone, Adapters, Prompts]:
        if self._backbone is None or self._adapters is None or self._prompts is None:
            with self._choosing:
                catalog = self._pinned = self.catalog
            try:
                backbone = Backbone(replace(catalog.base, device=self.device))
            except BaseException:
                self._pinned = None
                raise
            self._adapters = Adapters(backbone, self.max_adapters)
            self._prompts = Prompts(backbone.tokenizer, backbone.context, catalog.prompt_template)
            self._backbone = backbone
        return self._backbone, self._adapters, self._prompts

    def _begin(self, requests: Sequence[Request], found: Sequence[Found]) -> tuple[list[Row], Batch, list[Speaker]]:
        backbone, adapters, prompts = self._loaded()
        read = [prompts.ids(r.messages, r.decoding) for r in requests]  # before weights are: the quicker to fail
        roles = adapters.roles(found)
        rows = [
            Row(role, ids, request.decoding, prompts.stop_ids)
            for role, ids, request in zip(roles, read, requests, strict=True)
        ]
        speakers = [_on(backbone, replace(one.speaker, adapter_hash=adapters.hash(one) or "")) for one in found]
        return rows, Batch(backbone, rows), speakers

    def _score(self, run: Path, messages: list[Message], text: str, system: str) -> float:
        backbone, adapters, prompts = self._loaded()
        sequence = prompts.sequence(messages, text, system)
        roles = adapters.reward(run)
        scores = [score_sequences(backbone, role, [sequence], 1)[0] for role in roles]
        return sum(scores) / len(scores)

    # On the caller's

    def _found(self, name: str) -> Found:
        if name not in self.catalog.speakers:
            raise unknown(self.catalog, name)
        return self.catalog.speakers[name]

    def _do(self, work: Callable[[], Result]) -> Result:
        """Run on the model's thread.

        Raises:
            UserError: memory is used up; what the work held is given back first.
        """
        future: Future[Result] = self._thread.submit(work)
        try:
            return future.result()
        except BaseException as error:
            wait([future])  # an interrupted caller must not clean up under the feet of a running step
            if not is_out_of_memory(error):
                raise
            _let_go(error)
        del future
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.memory.empty_cache()
        raise UserError(
            "the memory of this machine is used up, so this was given up and its memory freed; ask again with fewer "
            "columns, a shorter conversation or fewer max tokens, or close other programs"
        )

    def _progress(self, answers: list[Progress], rows: Sequence[Row], started: float) -> list[Progress]:
        now = round((time.perf_counter() - started) * 1000)
        assert self._prompts is not None
        grown = []
        for answer, row in zip(answers, rows, strict=True):
            if not answer.done:
                answer = Progress(
                    text=self._prompts.text(row.completion, whole=row.ended),
                    tokens=len(row.completion),
                    milliseconds=now,
                    first_token_milliseconds=answer.first_token_milliseconds or now,
                    done=row.done,
                    ended=row.ended,
                    speaker=answer.speaker,
                )
            grown.append(answer)
        return grown


def _on(backbone: Backbone, speaker: Speaker) -> Speaker:
    info = backbone.info
    return replace(speaker, base=info.model, revision=info.revision, quantization=info.quantization)


def _let_go(error: BaseException) -> None:
    """Drop what an exception's frames hold, which may be all of the memory."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
