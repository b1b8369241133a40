"""An app without a model, for the tests of what stands above it: every answer names nobody and is known beforehand."""

import threading
from dataclasses import replace
from pathlib import Path

from lowrank_rlhf.arena.chat.catalog import Catalog, Found
from lowrank_rlhf.arena.chat.engine import Progress
from lowrank_rlhf.arena.options import Options
from lowrank_rlhf.arena.study import Study
from lowrank_rlhf.arena.votes.database import Store
from lowrank_rlhf.arena.votes.records import Speaker
from lowrank_rlhf.config import Base

# Words that no page has of itself, so that each of them in what a server sent is a leak
SECRETS = ("zanzibar-run", "quokka-run", "wombat-run")
HASH = "f00dfeed" * 8


class Voices:
    """Answers in four words, whoever is asked; in the middle `problem` is raised and `hold` waited for."""

    def __init__(self, catalog):
        self.catalog = catalog
        self.asked = []
        self.problem = None
        self.hold = None
        self.loaded = False
        self.scored = []

    def stream(self, requests, stop=lambda: False):
        self.asked.append(tuple(requests))
        words = [[f"answer {r.decoding.seed} word {i} " for i in range(4)] for r in requests]
        texts = [""] * len(words)
        by = [replace(self.catalog.speakers[r.speaker].speaker, adapter_hash=HASH) for r in requests]
        for step in range(4):
            if stop():
                break
            texts = [text + words[row][step] for row, text in enumerate(texts)]
            last = step == 3
            yield [Progress(t, step + 1, 10 * step, 10, last, last, speaker=s) for t, s in zip(texts, by, strict=True)]
            if step == 1 and self.problem:
                raise self.problem
            if step == 1 and self.hold:
                self.hold.wait(20)
        if stop():
            yield [Progress(t, 2, 20, 10, True, stopped=True, speaker=s) for t, s in zip(texts, by, strict=True)]

    def score(self, reward, prompt, text, system=""):
        self.scored.append((reward, text))
        return float(len(text)) / 7


class App:
    """What the pages and seats need of an arena."""

    def __init__(self, folder, prompts=(), models=SECRETS, reward=None, **options):
        path = Path(folder) / "prompts.jsonl"
        path.write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts))
        self.options = Options(
            runs=Path(folder), store=Path(folder) / "votes.db", prompts=str(path) if prompts else None, **options
        )
        speakers = {name: Found(Speaker(name, run=name, role="policy")) for name in models}
        self.catalog = Catalog(Base(), speakers, {"marmot-reward": Path(folder)}, [])
        self.engine = Voices(self.catalog)
        self.store = Store(self.options.store)
        self.study = Study(self.options, self.store, lambda: self.catalog)
        self.reward = reward

    def restarted(self):
        """The same options over the same store, in a new process as it were."""
        self.store = Store(self.options.store)
        self.study = Study(self.options, self.store, lambda: self.catalog)
        return self


def in_thread(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
