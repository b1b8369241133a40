"""Agreement, on the examples of the literature and on votes whose agreement is known."""

import numpy as np
import pytest
from vote_duels import pair

from lowrank_rlhf.arena.statistics.agreement import agreement, cohen_kappa, krippendorff_alpha, majority
from lowrank_rlhf.arena.statistics.duels import duels

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: four observers, twelve units, gaps
FOUR_OBSERVERS = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]


def units(rows):
    return [{f"{i}": row[u] for i, row in enumerate(rows) if row[u] != "."} for u in range(len(rows[0]))]


def test_kappa_of_two_diagnosticians():
    """Fleiss 1981, table 13.1: 100 patients, psychotic, neurotic, organic; p_o = 0.89, p_e = 0.66, κ = 0.68.

    Rows 75 1 4, 5 4 1, 0 0 10; rows sum to 80 10 10, columns to 80 5 15: p_e = 0.64 + 0.005 + 0.015.
    """
    table = {("p", "p"): 75, ("p", "n"): 1, ("p", "o"): 4, ("n", "p"): 5, ("n", "n"): 4, ("n", "o"): 1, ("o", "o"): 10}
    both = [labels for labels, count in table.items() for _ in range(count)]
    assert cohen_kappa(*zip(*both, strict=True)) == pytest.approx((0.89 - 0.66) / (1 - 0.66), abs=1e-12)


def test_kappa_at_its_ends():
    assert cohen_kappa("abab", "abab") == 1
    assert cohen_kappa("aabb", "abab") == 0  # p_o = p_e = ½
    assert cohen_kappa("abab", "baba") == -1
    assert cohen_kappa("aaaa", "aaaa") is None  # no habit to correct for, and nothing to tell apart
    assert cohen_kappa("", "") is None


def test_alpha_of_four_observers_with_gaps():
    """Krippendorff 2011: 0.743 for nominal data; a unit that one observer judged is left out."""
    assert krippendorff_alpha(units(FOUR_OBSERVERS)) == pytest.approx(0.743, abs=5e-4)


def test_alpha_of_two_observers():
    """Krippendorff 2011, section A: 0.095 for two observers and ten units of 0 and 1.

    4 of 10 disagree, so o₀₁ = 4; 14 zeros and 6 ones: 1 − (20 − 1)·4/(14·6).
    """
    rows = ["0100000010", "1110010000"]
    assert krippendorff_alpha(units(rows)) == pytest.approx(1 - 19 * 4 / (14 * 6), abs=1e-12)
    assert krippendorff_alpha(units(rows)) == pytest.approx(0.095, abs=5e-4)


def test_alpha_where_it_is_undefined():
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha([{"a": 1}, {"b": 2}]) is None
    assert krippendorff_alpha([{"a": 1, "b": 1}]) is None


def test_alpha_of_coins_is_nothing():
    """Independent labels: expectation near 0; |α| beyond five standard errors of about 1/√2000 would be a defect."""
    random = np.random.default_rng(0)
    said = [{"a": int(a), "b": int(b)} for a, b in random.integers(2, size=(2000, 2))]
    assert abs(krippendorff_alpha(said)) < 5 / np.sqrt(2000)


def test_majorities():
    assert majority(["first", "first", "neither"]) == "first"
    assert majority(["first", "second", "neither"]) is None
    assert majority([]) is None


def test_people_on_the_same_answers_agree_whatever_side_they_saw():
    """ann saw base on the left, bob on the right; both prefer sft on every prompt."""
    judged = [pair(f"{i}", "base", "sft", "b") for i in range(5)]
    judged += [pair(f"{i}", "sft", "base", "a", annotator="bob") for i in range(5)]
    found = agreement(duels(judged))
    assert found.shared_items == 5
    assert [(p.first, p.second, p.items, p.agreement) for p in found.pairs] == [("ann", "bob", 5, 1.0)]
    assert found.annotators[0].with_majority is None  # one other person is no majority


def test_other_texts_of_the_same_models_are_other_items():
    judged = [pair("p", "base", "sft", "a"), pair("p", "base", "sft", "a", annotator="bob", texts=("other", "texts"))]
    found = agreement(duels(judged))
    assert (found.shared_items, found.pairs, found.alpha) == (0, (), None)


def test_equal_texts_are_nothing_to_agree_on():
    judged = [pair("p", "base", "sft", "a", annotator=who, texts=("same", "same")) for who in ("ann", "bob")]
    assert agreement(duels(judged)).shared_items == 0


def test_the_majority_is_of_the_others():
    """Three people on four prompts; cyd differs on one. For ann the others split there, so it does not count."""
    choices = {"ann": "aaab", "bob": "aaab", "cyd": "aabb"}
    judged = [
        pair(f"{i}", "base", "sft", choice, annotator=who)
        for who, said in choices.items()
        for i, choice in enumerate(said)
    ]
    people = {one.name: one for one in agreement(duels(judged)).annotators}
    assert (people["ann"].majority_items, people["ann"].with_majority[0]) == (3, 1.0)
    assert (people["cyd"].majority_items, people["cyd"].with_majority[0]) == (4, 0.75)
    assert people["ann"].votes == 4


def test_repeats_measure_consistency_and_nothing_else():
    """Three originals for base, then swapped: kept, kept, and once the side A again, so the other answer."""
    originals = [pair(f"{i}", "base", "sft", "a") for i in range(3)]
    swapped = [
        pair(f"{i}", "sft", "base", choice, repeat_of=original.comparison.id)
        for i, (original, choice) in enumerate(zip(originals, "bba", strict=True))
    ]
    found = agreement(duels([*originals, *swapped]))
    ann = found.annotators[0]
    assert (ann.votes, ann.repeats, ann.same_side) == (6, 3, 1)
    assert ann.consistency[0] == found.consistency[0] == pytest.approx(2 / 3)
    assert found.shared_items == 0


def test_a_ranking_and_a_vote_are_compared_on_the_same_texts():
    """A pair shown by itself, and the same two answers within a ranking of three."""
    from lowrank_rlhf.arena.votes.records import Answer, Comparison, Decoding, Judged, Speaker, Vote

    prompt = ({"role": "user", "content": "p"},)
    answers = tuple(Answer(Speaker(n), Decoding(), prompt, f"{n} on p") for n in ("sft", "ppo", "base"))
    ranked = Comparison(answers, "bob", True)
    judged = [pair("p", "base", "sft", "b"), Judged(ranked, (Vote(ranked.id, "bob", "ranking", ranking=(1, 2, 3)),))]
    found = agreement(duels(judged))
    assert [(p.items, p.agreement) for p in found.pairs] == [(1, 1.0)]
