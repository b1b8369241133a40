"""From answers to figures, by hand: paired differences, what is compared with what, and how a report shows it."""

import pytest

from lowrank_rlhf.evaluation.answers import Answers
from lowrank_rlhf.evaluation.judges import Judged
from lowrank_rlhf.evaluation.summary import PolicyReport, Report, summarise, summarise_wins
from lowrank_rlhf.evaluation.tables import as_json, differs, markdown, print_report


def answers(texts, reward, kl_to_reference=None):
    n = len(texts)
    return Answers(texts, [len(t) for t in texts], [True] * n, {"reward": reward}, [1.0] * n, kl_to_reference)


PROMPTS = ["p", "q", "r"]


def test_a_difference_is_paired_by_prompt():
    """The prompts differ by 100, the policies by exactly 1 on each: the paired interval is [1, 1]."""
    ours, theirs = answers(["a", "b", "c"], [1.0, 101.0, 201.0]), answers(["a", "b", "c"], [0.0, 100.0, 200.0])
    metrics, differences = summarise(ours, theirs, PROMPTS, samples=1, seed=0)
    assert metrics["reward"][0] == pytest.approx(101.0)
    assert metrics["reward"][1] < 50 < 150 < metrics["reward"][2]
    assert differences["reward"] == (1.0, 1.0, 1.0)
    assert differences["length"] == differences["distinct_1"] == (0.0, 0.0, 0.0)


def test_kl_to_two_different_references_is_not_subtracted():
    ours, theirs = (answers(["a", "b", "c"], [0.0] * 3, [kl] * 3) for kl in (5.0, 2.0))
    metrics, differences = summarise(ours, theirs, PROMPTS, samples=1, seed=0)
    assert metrics["kl_to_reference"] == (5.0, 5.0, 5.0)
    assert "kl_to_reference" not in differences


def test_self_bleu_compares_samples_of_a_prompt_or_where_there_is_one_all_answers():
    texts = ["x y z w"] * 3
    one, _ = summarise(answers(texts, [0.0] * 3), answers(texts, [0.0] * 3), PROMPTS, samples=1, seed=0)
    assert one["self_bleu"][0] == 1.0
    four = answers(["a", "b", "b", "a"], [0.0] * 4)
    two, _ = summarise(four, four, ["p", "p", "q", "q"], samples=2, seed=0)
    assert two["self_bleu"][0] == 0.0


def test_comparisons_that_were_not_read_are_left_out_of_the_rate_and_counted():
    ours = answers(["aa", "b", "c"], [0.0] * 3)
    wins, facts = summarise_wins(Judged([1.0, None, 0.5], 0.4, [(1, "hm")]), ours, ours, PROMPTS, seed=0)
    assert wins["win_rate"][0] == 0.75
    assert facts == {"comparisons": 3, "read": 2, "first_rate": 0.4, "unreadable": [{"answer": 1, "said": "hm"}]}
    assert summarise_wins(Judged([None] * 3), ours, ours, PROMPTS, seed=0)[0] == {}


@pytest.mark.parametrize(("low", "high", "different"), [(0.55, 0.8, True), (0.2, 0.45, True), (0.45, 0.8, False)])
def test_a_win_rate_differs_where_its_interval_leaves_out_one_half(low, high, different):
    policy = PolicyReport("a", None, "base", {"win_rate": (0.6, low, high)}, {"kl_to_base": (3.0, 2.0, 4.0)})
    assert differs(policy, "win_rate") is different
    assert differs(policy, "kl_to_base") is False


def test_a_report_shows_stars_signed_differences_and_no_minus_zero(capsys):
    facts = {"prompts": 3, "samples": 1, "temperature": 1.0, "against": "base", "judge": None}
    base = PolicyReport("base", None, "base", {"reward": (-0.001, -0.2, 0.1)}, {"reward": (0.0, 0.0, 0.0)})
    ppo = PolicyReport("ppo", "runs/ppo", "base", {"reward": (1.5, 1.0, 2.0)}, {"reward": (1.501, 1.1, 1.9)})
    report = Report(facts, [base, ppo], ["gone"])
    print_report(report)
    text = capsys.readouterr().out
    assert "+0.00 │\n│        │ [-0.20, +0.10] │" in text
    assert "+1.50* │" in text
    assert "note: 3 prompts are too few for intervals" in text
    page = markdown(report)
    assert "| base | +0.00 [-0.20, +0.10] |" in page
    assert "| ppo − base | +1.50 [+1.10, +1.90] |" in page
    assert "- policy ppo: runs/ppo\n" in page
    assert as_json(report)["policies"][1]["metrics"] == {"reward": {"value": 1.5, "low": 1.0, "high": 2.0}}
