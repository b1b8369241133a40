"""RLHF on one GPU: one 4-bit base model, one low-rank adapter per role.

Importing this package is cheap on purpose (no torch), so that `lowrank-rlhf --help` answers at once.
"""

import os

__version__ = "0.1.0"

# trl sends one telemetry request per trainer unless told not to; nobody who runs a local recipe asked for that.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
