"""Judges for tests, named as `tests.judges:NAME`."""


def longer(prompts, completions, **columns):
    """A score: the number of characters."""
    return [len(text) for text in completions]


def first_if_longer(prompts, first, second, **columns):
    """A pairwise judge; it says nothing of answers with a question mark."""
    return [None if "?" in one + two else float(len(one) > len(two)) for one, two in zip(first, second, strict=True)]


def needs_an_answer(prompts, completions, *, answer, **columns):
    return [float(right in text) for right, text in zip(answer, completions, strict=True)]


def too_sure(prompts, first, second, **columns):
    return [1.5] * len(prompts)


def neither(texts):
    return [0.0] * len(texts)
