"""Comparisons and votes for the tests of the arena, in few words."""

from lowrank_rlhf.arena.votes.records import Answer, Comparison, Decoding, Speaker, Vote


def asked(text="What is 2 + 2?"):
    return ({"role": "user", "content": text},)


def answer(model="base", text="four", prompt=None, **decoding):
    return Answer(Speaker(model), Decoding(**decoding), prompt or asked(), text)


def compared(*answers, annotator="ana", blind=True, prompt=None, repeat_of=None):
    """A comparison of texts or answers; texts are of models m1, m2 …"""
    shown = [a if isinstance(a, Answer) else answer(f"m{i}", a, prompt) for i, a in enumerate(answers, start=1)]
    return Comparison(tuple(shown), annotator, blind, repeat_of)


def vote(comparison, choice=None, **fields):
    """A pair's vote, or with `ranking`, `up` or `text` one of the other kinds; those of one answer are on the first."""
    kind = next((k for f, k in (("ranking", "ranking"), ("up", "thumb"), ("text", "better")) if f in fields), "pair")
    if kind in ("thumb", "better"):
        fields.setdefault("answer", comparison.answers[0].id)
    return Vote(comparison.id, fields.pop("annotator", comparison.annotator), kind, choice, **fields)


def cast(store, comparison, *choices, **fields):
    """Save a comparison and a vote for each choice (one without any), and return the last."""
    store.save_comparison(comparison)
    return [store.save_vote(vote(comparison, choice, **fields)) for choice in choices or (None,)][-1]
