"""Programmatic rewards for tests, named in recipes as `tests.reward_functions:NAME`."""

ASKED_TOKENS = 8


def lowercase(prompts: list[str], completions: list[str], **columns: list[object]) -> list[float]:
    """Lower-case letters written, of the 8 tokens there is room for: the maximum is 1, chance is 26/258 ≈ 0.1."""
    return [sum("a" <= character <= "z" for character in text) / ASKED_TOKENS for text in completions]


def each_lowercase(prompts: list[str], completions: list[str], **columns: list[object]) -> list[float]:
    """The same, answer by answer: it may be asked while others are generated."""
    return lowercase(prompts, completions)


each_lowercase.overlap = "generation"  # type: ignore[attr-defined]


def zero(prompts: list[str], completions: list[str], **columns: list[object]) -> list[float]:
    return [0.0] * len(completions)


def one(prompts: list[str], completions: list[str], **columns: list[object]) -> list[float]:
    return [1.0] * len(completions)
