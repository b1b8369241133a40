"""Everything the pages share: the options, the runs found, the one base, the vote store and the study."""

import threading
from pathlib import Path

from lowrank_rlhf.arena.chat.catalog import Catalog, find
from lowrank_rlhf.arena.chat.engine import Engine
from lowrank_rlhf.arena.chat.scan import readable_runs
from lowrank_rlhf.arena.options import Options
from lowrank_rlhf.arena.study import Study
from lowrank_rlhf.arena.votes.database import Store
from lowrank_rlhf.config import Base
from lowrank_rlhf.errors import UserError


class Arena:
    """One app. Nothing heavy is loaded before somebody asks for an answer.

    Attributes:
        options: as given.
        store: of votes.
        catalog: what the last scan found; `rescan` looks again.
        engine: the one base.
        reward: name in `catalog.rewards` of the reward model whose scores are shown after a vote, None for none.
        study: the queue of each annotator.

    Raises:
        UserError: the store, the prompts, the reward run or a model to vote on is not what it should be.
    """

    def __init__(self, options: Options):
        self.options = options
        self._scanning = threading.Lock()
        self.catalog = self._scan()
        self.reward = _reward_name(self.catalog, options.reward)
        unknown = [name for name in options.models if name not in self.catalog.speakers]
        if unknown:
            known = ", ".join(self.catalog.speakers)
            raise UserError(f"--models: no model {unknown[0]!r} in {options.runs}; there are: {known}")
        self.engine = Engine(self.catalog, max_adapters=options.max_adapters)
        self.store = Store(options.store)
        self.study = Study(options, self.store, lambda: self.catalog)

    def rescan(self) -> Catalog:
        """Look for new runs; a base whose loading has started stays the base, with its template."""
        with self._scanning:
            self.catalog = self.engine.rescan(self._scan)
        return self.catalog

    def _scan(self, pinned: Catalog | None = None) -> Catalog:
        base = None if pinned else _named_base(self.options)
        return self._with_reward(find(self.options.runs, self.options.adapters, base, pinned=pinned))

    def _with_reward(self, catalog: Catalog) -> Catalog:
        """Add a reward run that lies elsewhere than the other runs."""
        folder = Path(self.options.reward) if self.options.reward else None
        if folder is None or str(folder) in catalog.rewards or not (folder / "run.json").is_file():
            return catalog
        if folder.resolve() not in {path.resolve() for path in catalog.rewards.values()}:
            elsewhere = find(folder, pinned=catalog)
            known = {problem.path.resolve() for problem in catalog.problems}
            catalog.problems.extend(p for p in elsewhere.problems if p.path.resolve() not in known)
            for name, path in elsewhere.rewards.items():
                catalog.rewards.setdefault(name, path)
        return catalog


def _named_base(options: Options) -> Base | None:
    """The base of --base, quantised as most of its runs are."""
    if options.base is None:
        return None
    infos = [run.info["base"] for run in readable_runs(options.runs, [])]
    used = [info["quantization"] for info in infos if info.get("model") == options.base]
    return Base(options.base, max(set(used), key=used.count)) if used else Base(options.base)


def _reward_name(catalog: Catalog, reward: str | None) -> str | None:
    """The name of the reward run that --reward names, itself by its name or by its folder."""
    if reward is None or reward in catalog.rewards:
        return reward
    folder = Path(reward).resolve()
    for name, path in catalog.rewards.items():
        if path.resolve() == folder:
            return name
    why = next((f": it {p.reason}" for p in catalog.problems if folder in (p.path.resolve(), *p.path.parents)), "")
    known = ", ".join(catalog.rewards) or "none"
    raise UserError(f"--reward: {reward} is no reward run on the base {catalog.base.model}{why}; there are: {known}")
