"""Trainings on another machine, over the system's ssh and rsync; nothing here imports torch."""
