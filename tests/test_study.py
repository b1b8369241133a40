"""Who is shown what: order, balance, repeats, and progress that a restart does not lose."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
from arena_fakes import SECRETS, App

from lowrank_rlhf.arena.options import Options
from lowrank_rlhf.arena.seat import Seat
from lowrank_rlhf.arena.study import Study
from lowrank_rlhf.errors import UserError

PROMPTS = [f"prompt {i}" for i in range(12)]


def judge(app, annotator, most=1000):
    """Vote A until there is nothing left; the comparisons in the order in which they were shown."""
    seat, seen = Seat(app, annotator), []
    while len(seen) < most:
        seat.next()
        list(seat.stream())
        if seat.comparison is None:
            break
        seen.append(seat.comparison)
        seat.vote("a")
    return seen


def said(comparison):
    return comparison.prompt[0]["content"]


def test_everybody_gets_every_prompt_once_in_an_order_of_their_own(tmp_path):
    app = App(tmp_path, PROMPTS, repeats=0)
    ana, ben = judge(app, "ana"), judge(app, "ben")
    assert sorted(map(said, ana)) == sorted(map(said, ben)) == sorted(PROMPTS)
    assert list(map(said, ana)) != list(map(said, ben)) != PROMPTS


def test_annotators_judge_the_same_answers_so_that_they_can_agree(tmp_path):
    app = App(tmp_path, PROMPTS, repeats=0)
    ana, ben = judge(app, "ana"), judge(app, "ben")
    assert len(app.engine.asked) == len(PROMPTS)
    answers = {said(c): {a.id for a in c.answers} for c in ana}
    assert answers == {said(c): {a.id for a in c.answers} for c in ben}
    sides = {said(c): c.answers[0].id for c in ana}
    assert 0 < sum(sides[said(c)] == c.answers[0].id for c in ben) < len(PROMPTS)


def test_pairs_are_balanced_and_so_are_sides(tmp_path):
    app = App(tmp_path, [f"p{i}" for i in range(60)], models=("w", "x", "y", "z"), repeats=0)
    shown = judge(app, "ana")
    pairs = Counter(frozenset(a.speaker.name for a in c.answers) for c in shown)
    assert set(pairs) == {frozenset(pair) for pair in combinations("wxyz", 2)}
    assert max(pairs.values()) - min(pairs.values()) <= 1  # 60 comparisons of 6 pairs: 10 of each
    lefts = Counter(c.answers[0].speaker.name for c in shown)
    assert all(5 <= lefts[name] <= 25 for name in "wxyz")  # 15 of 30 expected, 5 is 3.6 standard deviations off


def test_a_twentieth_comes_again_with_sides_swapped(tmp_path):
    app = App(tmp_path, [f"p{i}" for i in range(100)], repeats=0.05)
    shown = judge(app, "ana")
    repeats = [c for c in shown if c.repeat_of]
    assert len(repeats) in (5, 6)  # 100 x 0.05, rounded up or down
    first = {c.id: (at, c) for at, c in enumerate(shown) if not c.repeat_of}
    for repeat in repeats:
        at, original = first[repeat.repeat_of]
        assert repeat.answers == original.answers[::-1]
        assert repeat.blind
        assert shown.index(repeat) - at > 3
    assert len({c.repeat_of for c in repeats}) == len(repeats)
    assert len(app.engine.asked) == 100  # none was generated for a repeat
    assert app.study.progress("ana") == (len(shown), len(shown))


def test_progress_moves_with_every_vote_so_that_it_gives_no_repeat_away(tmp_path):
    app = App(tmp_path, [f"p{i}" for i in range(20)], repeats=0.3)
    seat, seen = Seat(app, "ana"), []
    while True:
        seat.next()
        list(seat.stream())
        seen.append(app.study.progress("ana"))
        if seat.state == "finished":
            break
        seat.vote("tie")
    totals = {total for _, total in seen}
    assert [done for done, _ in seen] == list(range(len(seen)))
    assert len(totals) == 1
    assert totals.pop() == len(seen) - 1


def test_a_restart_goes_on_where_it_was(tmp_path):
    app = App(tmp_path, PROMPTS, repeats=0)
    before = judge(app, "ana", 5)
    seat = Seat(app, "ana")
    seat.next()
    list(seat.stream())
    left_open = seat.comparison
    again = App(tmp_path, PROMPTS, repeats=0)
    assert again.study.progress("ana") == (5, 12)
    seat = Seat(again, "ana")
    seat.next()
    assert seat.comparison == left_open  # and not other answers to choose from
    assert again.engine.asked == []
    rest = judge(again, "ana")
    assert sorted(map(said, before + rest)) == sorted(PROMPTS)


def test_what_is_skipped_comes_last(tmp_path):
    app = App(tmp_path, ["x", "y", "z"], repeats=0)
    seat = Seat(app, "ana")
    seat.next()
    list(seat.stream())
    skipped = said(seat.comparison)
    seat.skip()
    order = list(map(said, judge(app, "ana")))
    assert (len(order), order[-1]) == (3, skipped)


def test_an_undone_comparison_never_comes_again_as_a_blind_one(tmp_path):
    app = App(tmp_path, ["x"], repeats=0)
    seat = Seat(app, "ana")
    seat.next()
    list(seat.stream())
    known = {a.id for a in seat.comparison.answers}
    seat.vote("a")
    seat.undo()
    later = Seat(app, "ana")
    later.next()
    assert not later.comparison.blind
    later.skip()
    list(later.stream())
    assert later.comparison.blind
    assert known.isdisjoint(a.id for a in later.comparison.answers)


def test_more_samples_than_models_are_several_of_one(tmp_path):
    app = App(tmp_path, ["x"], samples=5, models=("m", "n"))
    seat = Seat(app, "ana")
    seat.next()
    list(seat.stream())
    assert sorted(Counter(a.speaker.name for a in seat.comparison.answers).values()) == [2, 3]
    assert len({a.decoding.seed for a in seat.comparison.answers}) == 5


def test_only_the_chosen_models_answer(tmp_path):
    app = App(tmp_path, PROMPTS)
    assert app.study.models == list(SECRETS)
    app.study.options = replace(app.options, models=SECRETS[1:])
    assert app.study.models == list(SECRETS[1:])
    asked = {answer.speaker.name for shown in judge(app, "ana") for answer in shown.answers}
    assert asked == set(SECRETS[1:])


def test_a_system_prompt_in_the_file_is_the_answers(tmp_path):
    path = tmp_path / "system.jsonl"
    path.write_text(
        '{"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}\n'
        '{"prompt": "Hi"}\n{"prompt": "Hi"}\n'
    )
    app = App(tmp_path, ["unused"], repeats=0)
    app.study = Study(replace(app.options, prompts=str(path)), app.store, lambda: app.catalog)
    shown = judge(app, "ana")
    assert sorted((said(c), c.answers[0].decoding.system) for c in shown) == [("Hi", ""), ("Hi", "Be brief.")]


def test_a_prompt_that_nobody_can_answer_is_refused_by_row(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n')
    app = App(tmp_path)
    with pytest.raises(UserError, match=r"bad\.jsonl.* does not end with a user's message"):
        Study(Options(prompts=str(path)), app.store, lambda: app.catalog)
