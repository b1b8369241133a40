"""One module per stage, each with a `train(recipe, run)`. No stage imports another."""
