"""`lowrank-rlhf bench`: seconds, memory and tokens per second of every stage, beside four separate models."""
