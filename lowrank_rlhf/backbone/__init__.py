"""The 4-bit base, its adapters and heads. The only package that imports peft and bitsandbytes."""

from lowrank_rlhf.backbone.base import BaseInfo

__all__ = ["BaseInfo"]
