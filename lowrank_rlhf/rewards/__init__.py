"""Anything that scores completions: reward adapters on the shared base, Python functions, verifiers, reward servers."""

from lowrank_rlhf.rewards.functions import FunctionReward, check_columns, import_function, reward_function
from lowrank_rlhf.rewards.http import ServerReward
from lowrank_rlhf.rewards.judging import Judging, Worker
from lowrank_rlhf.rewards.scored import Reward, Scored, column_names
from lowrank_rlhf.rewards.sources import (
    AdapterReward,
    Weighted,
    WeightedSum,
    load_members,
    load_rewards,
    member_names,
    members_line,
    reward_source,
    saved_members,
)
from lowrank_rlhf.rewards.verifiers import VERIFIERS

__all__ = [
    "VERIFIERS",
    "AdapterReward",
    "FunctionReward",
    "Judging",
    "Reward",
    "Scored",
    "ServerReward",
    "Weighted",
    "WeightedSum",
    "Worker",
    "check_columns",
    "column_names",
    "import_function",
    "load_members",
    "load_rewards",
    "member_names",
    "members_line",
    "reward_function",
    "reward_source",
    "saved_members",
]
