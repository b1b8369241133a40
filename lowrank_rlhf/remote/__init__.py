"""Training on machines that are not this one, and on more than one GPU."""
