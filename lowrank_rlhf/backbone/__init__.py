"""The 4-bit base, its adapters and heads. The only package that imports peft and bitsandbytes."""

from lowrank_rlhf.backbone.base import BaseInfo
from lowrank_rlhf.backbone.roles import Backbone

__all__ = ["Backbone", "BaseInfo"]
