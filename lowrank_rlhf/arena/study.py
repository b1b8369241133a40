"""Who is shown what: each annotator's way through the prompts, who answers, and what is shown again."""

import hashlib
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from lowrank_rlhf.arena.chat.catalog import Catalog
from lowrank_rlhf.arena.options import Options
from lowrank_rlhf.arena.votes.checks import DECIDING
from lowrank_rlhf.arena.votes.database import Store
from lowrank_rlhf.arena.votes.reading import last_of_each
from lowrank_rlhf.arena.votes.records import Answer, Comparison, Decoding, Message, prompt_key
from lowrank_rlhf.data import Example, read_examples
from lowrank_rlhf.errors import UserError

APART = 3  # comparisons between one and its repeat, where there are that many
Turns = tuple[Message, ...]
Key = tuple[str, str]  # of a prompt, and its system prompt


@dataclass(frozen=True)
class Item:
    """What an annotator is to judge next.

    Attributes:
        prompt, system: what is answered.
        speakers, decodings: who is to answer and how, in the order shown; unused where there is a `comparison`.
        comparison: its answers are there already.
    """

    prompt: Turns
    system: str = ""
    speakers: tuple[str, ...] = ()
    decodings: tuple[Decoding, ...] = ()
    comparison: Comparison | None = None

    @property
    def key(self) -> Key:
        return prompt_key(self.prompt), self.system

    @staticmethod
    def shown(comparison: Comparison) -> "Item":
        first = comparison.answers[0]
        return Item(first.prompt, first.decoding.system, comparison=comparison)


@dataclass
class History:
    """What one annotator has done so far, as the store has it."""

    judged: list[Comparison] = field(default_factory=list)  # with a choice or a ranking that stands
    seen: set[str] = field(default_factory=set)  # ids of answers
    repeated: set[str] = field(default_factory=set)  # ids of comparisons that were shown again
    open: Comparison | None = None  # the last one shown, where it was never voted on


class Study:
    """The prompts of a study, in another order for each annotator, and what of them is done.

    All annotators judge the same answers to a prompt, so that their agreement can be measured: the first one's are
    generated, by the models that have met least, and the others are shown those, in an order of their own. A share of
    an annotator's comparisons comes again with swapped sides. All progress is what the store holds, so it survives
    a restart; only what was skipped is forgotten, and comes again.

    Args:
        catalog: gives what the last scan of the runs found.

    Raises:
        UserError: the prompts cannot be read.
    """

    def __init__(self, options: Options, store: Store, catalog: Callable[[], Catalog]):
        self.options, self.store, self._catalog = options, store, catalog
        self.prompts = _prompts(options.prompts) if options.prompts else {}
        self._skipped: dict[str, list[Key | str]] = {}
        self._answered: dict[Key, list[tuple[str, tuple[str, ...]]]] = {}  # comparison id, speakers
        self._met: Counter[frozenset[str]] = Counter()
        self._used: Counter[str] = Counter()
        self._attempts = itertools.count(1)
        self._lock = threading.RLock()
        for comparison, _ in store.history():
            self.count(comparison)

    @property
    def models(self) -> list[str]:
        """Who is voted on: those of --models, else the base and what every finished run ended with."""
        speakers = self._catalog().speakers
        chosen = [name for name in self.options.models if name in speakers]
        return chosen or [name for name, found in speakers.items() if found.speaker.step is None]

    def next(self, annotator: str) -> Item | None:
        """What this annotator is to judge now, None when all is judged; asking again gives the same.

        What was shown before and not voted on comes first, then a repeat where one is due, then the next prompt.
        """
        history = self.history(annotator)
        with self._lock:
            skipped = self._skipped.get(annotator, [])
            left = history.open
            if left is not None and left.id not in skipped and _fits(left, self.options.samples):
                return Item.shown(left)
            if repeat := self._repeat(annotator, history):
                return Item.shown(repeat)
            done = {_key(comparison) for comparison in history.judged}
            for key in sorted(self._order(annotator), key=lambda key: skipped.index(key) if key in skipped else -1):
                if key not in done:
                    return self._item(key, annotator, history)
        return None

    def free(self, text: str) -> Item:
        """A prompt of the annotator's own.

        Raises:
            UserError: it is empty.
        """
        if not text.strip():
            raise UserError("The prompt is empty: write what is to be answered.")
        prompt = ({"role": "user", "content": text.encode("utf-8", "replace").decode()},)
        return self._asked(prompt, "", random.Random())

    def again(self, item: Item) -> Item:
        """The same prompt to the same models in a new order, with other seeds."""
        speakers = item.speakers
        if item.comparison is not None:
            speakers = tuple(answer.speaker.name for answer in item.comparison.answers)
        known = self._catalog().speakers
        if not all(name in known for name in speakers):
            return self.anew(item)
        return self._to(item.prompt, item.system, list(speakers), random.Random())

    def anew(self, item: Item) -> Item:
        """The same prompt to those who have met least by now."""
        return self._asked(item.prompt, item.system, random.Random())

    def skip(self, annotator: str, item: Item) -> None:
        """Put off to the end of this annotator's queue; a repeat is not shown again."""
        with self._lock:
            skipped = self._skipped.setdefault(annotator, [])
            for what in (
                item.key,
                item.comparison and item.comparison.id,
                item.comparison and item.comparison.repeat_of,
            ):
                if what:
                    skipped[:] = [*(kept for kept in skipped if kept != what), what]

    def count(self, comparison: Comparison) -> None:
        """Remember a comparison that was stored: who has met whom, and which answers there are."""
        names = tuple(answer.speaker.name for answer in comparison.answers)
        if not comparison.blind or len(names) < 2 or comparison.repeat_of:
            return
        with self._lock:
            self._pair(names)
            if (key := _key(comparison)) in self.prompts and comparison.prompt is not None:
                self._answered.setdefault(key, []).append((comparison.id, names))

    def failed(self, item: Item) -> None:
        """Remember that answers could not be written: their models have had this turn, so that others come first.

        Else one that is broken has always met least, and is drawn for ever.
        """
        with self._lock:
            self._pair(item.speakers)

    def progress(self, annotator: str) -> tuple[int, int]:
        """How many comparisons of the queue this annotator has judged, repeats included, and of how many.

        Repeats count, or the number that stands still would give them away.
        """
        judged = self.history(annotator).judged
        done = {_key(comparison) for comparison in judged} & self.prompts.keys()
        repeats = sum(comparison.repeat_of is not None for comparison in judged)
        planned = max(repeats, int(len(self.prompts) * self.options.repeats + self._phase(annotator)))
        return len(done) + repeats, len(self.prompts) + planned if self.prompts else 0

    def history(self, annotator: str) -> History:
        """What the store holds of this annotator's blind comparisons of two answers and more."""
        history = History()
        for comparison, votes in self.store.history(annotator):
            if len(comparison.answers) < 2:
                continue
            history.seen.update(answer.id for answer in comparison.answers)
            if comparison.repeat_of:
                history.repeated.add(comparison.repeat_of)
            if any(vote.kind in DECIDING for vote in last_of_each(votes)):
                history.judged.append(comparison)
            decided = any(vote.kind in DECIDING for vote in votes)
            history.open = None if decided else comparison
        return history

    def _pair(self, names: Sequence[str]) -> None:
        self._met.update(frozenset(pair) for pair in itertools.combinations(names, 2))
        self._used.update(names)

    def _order(self, annotator: str) -> list[Key]:
        order = list(self.prompts)
        self._random("order", annotator).shuffle(order)
        return order

    def _repeat(self, annotator: str, history: History) -> Comparison | None:
        """One of the annotator's earlier comparisons with its sides swapped, where the share of repeats wants one."""
        skipped = self._skipped.get(annotator, [])
        first = [
            c for c in history.judged if c.repeat_of is None and c.blind and len(c.answers) == self.options.samples
        ]
        due = int(len(first) * self.options.repeats + self._phase(annotator)) - len(history.repeated)
        old = first[:-APART] if len(first) > APART else first[:-1]
        choices = [c for c in old if c.id not in history.repeated and c.id not in skipped]
        if due < 1 or not choices:
            return None
        chosen = self._random("repeat", annotator, len(first)).choice(choices)
        return Comparison(tuple(reversed(chosen.answers)), annotator, True, repeat_of=chosen.id)

    def _phase(self, annotator: str) -> float:
        """Where in its round an annotator's count of repeats begins, so that nobody can count them out."""
        return self._random("phase", annotator).random() if self.options.repeats else 0.0

    def _item(self, key: Key, annotator: str, history: History) -> Item:
        prompt, system = self.prompts[key]
        rng = self._random("sides", annotator, *key)
        models = set(self.models)
        for comparison_id, names in self._answered.get(key, []):
            if len(names) != self.options.samples or not models.issuperset(names):
                continue
            stored = self.store.comparison(comparison_id)
            if stored and not history.seen & {answer.id for answer in stored.answers}:
                answers = rng.sample([_unscored(a) for a in stored.answers], len(names))
                return Item.shown(Comparison(tuple(answers), annotator, True))
        return self._asked(prompt, system, rng)

    def _asked(self, prompt: Turns, system: str, rng: random.Random) -> Item:
        """New answers by those who have met least; of one model there are several where there are not enough."""
        with self._lock:
            models, chosen = self.models, list[str]()
            rng.shuffle(models)  # among those equally often used, any
            while len(chosen) < self.options.samples:
                met = {name: sum(self._met[frozenset((name, other))] for other in chosen) for name in models}
                chosen.append(min(models, key=lambda name: (chosen.count(name), met[name], self._used[name])))
        return self._to(prompt, system, chosen, rng)

    def _to(self, prompt: Turns, system: str, speakers: list[str], rng: random.Random) -> Item:
        rng.shuffle(speakers)
        drawn = self._random("seeds", *prompt_key(prompt), next(self._attempts), rng.random())
        plain = Decoding(max_new_tokens=self._catalog().limits.max_completion_tokens, system=system)
        decodings = tuple(replace(plain, seed=drawn.randrange(2**31)) for _ in speakers)
        return Item(prompt, system, tuple(speakers), decodings)

    def _random(self, *of: object) -> random.Random:
        """A generator that is the same whenever it is asked for the same."""
        named = "\n".join(map(str, (self.options.seed, *of)))
        return random.Random(int.from_bytes(hashlib.sha256(named.encode()).digest()[:8], "big"))


def _prompts(path: str) -> dict[Key, tuple[Turns, str]]:
    """The prompts of a data file of any format, each once; a leading system message becomes the system prompt."""
    prompts: dict[Key, tuple[Turns, str]] = {}
    for example in read_examples(path):
        turns, system = _split(example)
        prompts.setdefault((prompt_key(turns), system), (turns, system))
    return prompts


def _split(example: Example) -> tuple[Turns, str]:
    turns, system = tuple(example.prompt), ""
    if turns and turns[0]["role"] == "system":
        system, turns = turns[0]["content"], turns[1:]
    if not turns or turns[-1]["role"] != "user":
        raise UserError(f"{example.where}: the prompt does not end with a user's message, so nothing can answer it")
    return turns, system


def _key(comparison: Comparison) -> Key:
    first = comparison.answers[0]
    return prompt_key(first.prompt), first.decoding.system


def _fits(comparison: Comparison, samples: int) -> bool:
    """Whether one that was left open can be shown now: its answers are to one prompt, and as many as are ranked."""
    return len(comparison.answers) == samples and comparison.prompt is not None


def _unscored(answer: Answer) -> Answer:
    return replace(answer, score=None, scored_by=None)
