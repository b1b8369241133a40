"""Metrics to experiment trackers. None is needed: metrics.jsonl holds the same numbers."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowrank_rlhf.config import Track
from lowrank_rlhf.errors import UserError


class Trackers:
    """The trackers a recipe names, opened.

    Args:
        track: the recipe's group.
        run_dir: TensorBoard writes into it; its name is the run's name elsewhere.
        recipe: resolved, shown as the run's configuration.
    """

    def __init__(self, track: Track, run_dir: Path, recipe: dict[str, Any]):
        self.log_functions: list[Callable[[int, dict[str, float]], None]] = []
        self.close_functions: list[Callable[[], None]] = []
        for name in track.report_to:
            if name == "tensorboard":
                self._tensorboard(run_dir)
            else:
                self._like_wandb(name, track.project, run_dir.name, recipe)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for log in self.log_functions:
            log(step, metrics)

    def close(self) -> None:
        for close in self.close_functions:
            close()

    def _tensorboard(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(str(run_dir / "tensorboard"))

        def log(step: int, metrics: dict[str, float]) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)

        self.log_functions.append(log)
        self.close_functions.append(writer.close)

    def _like_wandb(self, name: str, project: str, run_name: str, recipe: dict[str, Any]) -> None:
        """W&B, and trackio, which has the same functions and keeps its data on this machine."""
        library = importlib.import_module(name)
        library.init(project=project, name=run_name, config=recipe)
        self.log_functions.append(lambda step, metrics: library.log(metrics, step=step))
        self.close_functions.append(library.finish)


def check_installed(track: Track) -> None:
    """
    Raises:
        UserError: a tracker that the recipe names is not installed.
    """
    for name in track.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"track.report_to: {name} is not installed; pip install {name}")
