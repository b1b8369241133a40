"""The part of trl's trainers that lets several processes share a step; alone, it changes nothing."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from lowrank_rlhf import processes
from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.stages.early_stopping import Best


class SharedSteps(Trainer):
    """Every process learns from every n-th micro-batch of a step; their gradients are added up before clipping.

    To the trainer each process looks like one alone that sees all micro-batches, so that steps, epochs with their last
    step, losses, KTO's KL and figures are those of one process with the same recipe.
    """

    best: Best
    backbone: Backbone
    _metrics: Any  # trl's: "train" → name → values since the last log
    _total_train_tokens: Any
    seen = 0  # micro-batches of this step

    def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        model._is_accelerate_prepared = processes.count() > 1  # so that accelerate does not wrap it for its own way
        return super()._wrap_model(model, *args, **kwargs)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """All batches: accelerate would give this process a part of them, filled up with rows that come twice."""
        loader = super()._get_dataloader(*args, **kwargs)
        if isinstance(loader.batch_sampler, BatchSamplerShard):
            sampler = loader.batch_sampler
            sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
        return loader

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The loss as its mean over the processes is to be logged."""
        mine, step = self.seen % processes.count() == processes.rank(), super().training_step
        figures, tokens = copy.deepcopy(self._metrics), self._total_train_tokens

        def learn() -> Tensor:
            self._metrics, self._total_train_tokens = copy.deepcopy(figures), tokens  # not of an attempt that failed
            return step(model, inputs, *args, **kwargs)

        loss = self.backbone.learn(self.rows(inputs), learn) if mine else torch.zeros((), device=self.args.device)
        self.seen += 1
        if self.accelerator.sync_gradients:
            processes.add_gradients(self.best.parameters)
            self.seen = 0
        return loss * processes.count()

    def rows(self, inputs: dict[str, Any]) -> int:
        """Of a micro-batch."""
        return len(inputs["input_ids"])

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:  # type: ignore[override]
        return super().floating_point_ops(inputs) / processes.count()  # the trainer adds up those of all

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return super().get_total_train_batch_size(args) // processes.count()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """trl's figures, each the mean over the micro-batches of all processes, and the tokens of all."""
        figures = self._metrics["train"]
        parts = processes.gather(dict(figures))
        for name in dict.fromkeys(name for part in parts for name in part):
            figures[name] = [value for part in parts for value in part.get(name, [])]
        if "num_tokens" in figures:
            figures["num_tokens"] = [sum(processes.gather(self._total_train_tokens))]
        super().log(logs, *args, **kwargs)

    def held_out_batches(self) -> Iterator[dict[str, Any]]:
        """This process's share of them, on its device."""
        batches = islice(self.get_eval_dataloader(), processes.rank(), None, processes.count())
        return map(self._prepare_inputs, batches)

    @contextmanager
    def own_figures(self) -> Iterator[None]:
        """trl's loss of a micro-batch does not look at what the other processes have."""
        self.accelerator.gather = self.accelerator.gather_for_metrics = _unchanged
        try:
            yield
        finally:
            del self.accelerator.gather, self.accelerator.gather_for_metrics

    def _save_rng_state(self, output_dir: str) -> None:
        """The main process writes what every process has."""
        with TemporaryDirectory() as scratch:
            super()._save_rng_state(scratch)
            (mine,) = Path(scratch).iterdir()
            states = processes.gather((mine.name, mine.read_bytes()))
        if processes.is_main():
            for name, state in states:
                Path(output_dir, name).write_bytes(state)


def _unchanged(values: Any) -> Any:
    return values
