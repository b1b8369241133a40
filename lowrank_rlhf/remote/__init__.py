"""Trainings on another machine, over the system's ssh and rsync; nothing here imports torch."""

FOLDER = "lowrank-rlhf"  # of everything on the other machine, in the home directory
