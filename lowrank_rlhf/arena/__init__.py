"""Chat with checkpoints side by side on the one base, vote blind, and train on the votes."""
