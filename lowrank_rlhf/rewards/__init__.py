"""Anything that scores completions: reward adapters on the shared base, or a Python function."""

from lowrank_rlhf.rewards.sources import AdapterReward, FunctionReward, Reward, load_rewards

__all__ = ["AdapterReward", "FunctionReward", "Reward", "load_rewards"]
