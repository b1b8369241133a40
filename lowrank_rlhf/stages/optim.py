"""Optimizer and schedule from a recipe's train group, shared by the loops that are ours."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from lowrank_rlhf.config import PPOTrain, Train


def optimizer_and_schedule(
    parameters: list[nn.Parameter], train: Train | PPOTrain, steps: int, learning_rate: float | None = None
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """AdamW (PyTorch's, fused as transformers' Trainer has it) and a transformers schedule over `steps` steps."""
    rate = learning_rate or train.learning_rate
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=train.weight_decay, fused=True)
    warmup = round(train.warmup_ratio * steps)
    name = "constant_with_warmup" if train.lr_schedule == "constant" else train.lr_schedule
    return optimizer, get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
