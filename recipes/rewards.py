"""Reward functions for recipes: `fn(prompts, completions, **columns) -> list[float]`."""


def concise(prompts: list[str], completions: list[str], **columns: list[object]) -> list[float]:
    """1.0 for an answer of 8 to 40 words that ends a sentence and repeats no three words in a row; less otherwise.

    >>> concise([""], ["Boil the egg for seven minutes, then cool it in cold water."])
    [1.0]
    """
    return [_concise(text) for text in completions]


def _concise(text: str) -> float:
    words = text.lower().split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    checks = (
        8 <= len(words) <= 40,
        text.rstrip().endswith((".", "!", "?")),
        len(words) > 2 and len(set(triples)) == len(triples),
    )
    return sum(checks) / len(checks)
