"""The leaderboard as a whole: through the store, as plain data, and in words."""

import json
import subprocess
import sys

import numpy as np
import pytest
from vote_duels import pair

from lowrank_rlhf.arena.statistics.duels import duels, thumbs
from lowrank_rlhf.arena.statistics.report import as_json, leaderboard, text_report
from lowrank_rlhf.arena.statistics.words import EMPTY
from lowrank_rlhf.arena.votes.database import Store
from lowrank_rlhf.arena.votes.records import Answer, Comparison, Decoding, Judged, Speaker, Vote

STRENGTHS = {"ppo": 0.9, "sft": 0.0, "base": -0.9}


def votes(count=150, prompts=50, seed=0, **others):
    """Two annotators' blind votes; scores follow the strengths with noise."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        left, right = random.choice(list(STRENGTHS), 2, replace=False)
        gap = STRENGTHS[left] - STRENGTHS[right]
        choice = (
            random.choice(["tie", "both_bad"]) if i % 10 == 9 else "ab"[int(random.random() > 1 / (1 + np.exp(-gap)))]
        )
        scores = (STRENGTHS[left] + random.normal(), STRENGTHS[right] + random.normal())
        tokens = (int(random.integers(5, 50)), int(random.integers(5, 50)))
        who = ("ann", "bob")[i % 2]
        found.append(
            pair(f"prompt {i % prompts}", left, right, choice, annotator=who, scores=scores, tokens=tokens, **others)
        )
    return found


def test_a_store_gives_the_same_leaderboard_as_its_votes(tmp_path):
    judged = votes(60, 20)
    store = Store(tmp_path / "votes.db")
    for one in judged:
        store.save_comparison(one.comparison)
        store.save_vote(one.votes[0])
    found = leaderboard(store)
    assert found.standings == leaderboard(judged).standings
    assert [one.player for one in found.standings] == ["ppo", "sft", "base"]
    assert found.counts.votes == 60
    assert text_report(store) == text_report(judged)


def test_a_withdrawn_or_superseded_vote_does_not_count(tmp_path):
    store = Store(tmp_path / "votes.db")
    kept, changed, withdrawn = votes(3, 3)
    for one in (kept, changed, withdrawn):
        store.save_comparison(one.comparison)
        store.save_vote(one.votes[0])
    store.save_vote(Vote(changed.comparison.id, changed.comparison.annotator, "pair", choice="both_bad"))
    store.withdraw(withdrawn.votes[0].id, withdrawn.comparison.annotator)
    counts = leaderboard(store).counts
    assert (counts.votes, counts.both_bad) == (2, 1)


def test_wins_losses_and_ties_of_the_matrix_are_the_votes():
    """x beats y twice, loses once, ties once; y beats z once."""
    judged = [pair(f"{i}", "x", "y", choice) for i, choice in enumerate(["a", "a", "b", "tie"])]
    judged.append(pair("z", "z", "y", "b"))
    found = leaderboard(judged)
    place = {one.player: i for i, one in enumerate(found.standings)}
    x, y, z = place["x"], place["y"], place["z"]
    assert (found.wins[x][y], found.wins[y][x], found.games[x][y], found.games[y][x]) == (2, 1, 4, 4)
    assert (found.wins[y][z], found.games[z][x], found.games[z][y]) == (1, 0, 1)
    standing = found.standings[x]
    assert (standing.wins, standing.losses, standing.ties, standing.votes, standing.prompts) == (2, 1, 1, 4, 4)
    assert found.chances[x][y] + found.chances[y][x] == pytest.approx(1)
    assert found.chances[x][x] is None


def test_repeats_and_votes_between_one_model_are_not_on_the_board():
    first = pair("p", "x", "y", "a")
    again = pair("p", "y", "x", "a", repeat_of=first.comparison.id)
    itself = pair("q", "x", "x", "a", texts=("one", "other"))
    found = leaderboard([first, again, itself])
    assert sum(one.wins for one in found.standings) == 1
    assert (found.counts.votes, found.counts.repeats, found.counts.against_itself) == (3, 1, 1)
    assert found.agreement.repeats == 1
    assert sum("Not on the board" in said for said in found.notes) == 2


def test_blind_only_leaves_out_what_was_voted_with_names():
    judged = [pair(f"{i}", "x", "y", "a") for i in range(8)] + [
        pair(f"{i}", "x", "y", "b", blind=False) for i in range(9)
    ]
    assert leaderboard(judged).standings[0].player == "y"
    assert leaderboard(judged, blind_only=True).standings[0].player == "x"
    assert any("9 of 17 votes were not blind" in said for said in leaderboard(judged).notes)
    assert not any("not blind" in said for said in leaderboard(judged, blind_only=True).notes)


def test_one_name_with_two_weights_is_two_players():
    judged = [
        pair("p", "ppo", "base", "a", hashes=("aaaaaaaa11", "")),
        pair("q", "ppo", "base", "b", hashes=("bbbbbbbb22", "")),
    ]
    assert {one.player for one in leaderboard(judged).standings} == {"ppo (aaaaaaaa)", "ppo (bbbbbbbb)", "base"}


def test_turns_of_one_conversation_are_one_prompt():
    """The second turn of two columns that went different ways still falls to the first question."""
    first = ({"role": "user", "content": "hi"},)
    later = [(*first, {"role": "assistant", "content": said}, {"role": "user", "content": "why?"}) for said in "xy"]
    judged = [pair("hi", "x", "y", "a")]
    answers = tuple(Answer(Speaker(name), Decoding(), later[i], f"{name} again") for i, name in enumerate("xy"))
    comparison = Comparison(answers, "ann", True)
    judged.append(Judged(comparison, (Vote(comparison.id, "ann", "pair", choice="a"),)))
    assert len({duel.prompt for duel in duels(judged)}) == 1


def test_thumbs_are_counted_by_player():
    answers = [Answer(Speaker("x"), Decoding(), ({"role": "user", "content": "?"},), f"{i}") for i in range(3)]
    judged = []
    for answer, up in zip(answers, (True, True, False), strict=True):
        comparison = Comparison((answer,), "ann", False)
        judged.append(Judged(comparison, (Vote(comparison.id, "ann", "thumb", up=up, answer=answer.id),)))
    assert thumbs(judged) == {"x": (2, 3)}
    found = leaderboard([*judged, pair("p", "x", "y", "a")])
    assert {one.player: (one.thumbs_up, one.thumbs) for one in found.standings} == {"x": (2, 3), "y": (0, 0)}


def test_as_json_is_json_with_open_ends_as_null():
    """x never lost, so its rating has no upper end, which JSON cannot say as a number."""
    judged = [pair(f"{i}", "x", "y", "a", tokens=(9, 7), scores=(1.0, 0.0)) for i in range(12)]
    plain = json.loads(json.dumps(as_json(leaderboard(judged)), allow_nan=False))
    rating = plain["standings"][0]["rating"]
    assert rating["high"] is None
    assert rating["low"] < rating["value"]
    assert plain["rewards"][0]["accuracy"]["model"]["value"] == 1
    assert set(plain["rewards"][0]["favours"]["x"]) == {"value", "low", "high"}
    assert plain["side"]["share"] == {"value": 1, "low": pytest.approx(0.025 ** (1 / 12)), "high": 1}


def test_the_text_says_what_to_know():
    said = text_report(votes(200, 40))
    assert said.startswith("200 votes of 2 people on 40 prompts, 3 models")
    lines = said.splitlines()
    board = [line.split()[:2] for line in lines[lines.index("Leaderboard") + 2 :][:3]]
    assert [name for _, name in board] == ["ppo", "sft", "base"]
    assert any(line.startswith("Reward model: Yes: rm agrees with people on") for line in lines)
    assert any(line.startswith("Pairs: 90% decided") for line in lines)
    assert any(line.startswith("Side: no bias found") for line in lines)


def test_groups_that_never_met_are_named():
    judged = [pair(f"{i}", "a", "b", "ab"[i % 2]) for i in range(12)] + [pair(f"{i}", "c", "d", "a") for i in range(12)]
    found = leaderboard(judged)
    (said,) = (note for note in found.notes if note.startswith("Not connected"))
    assert said.startswith("Not connected: a, b | c, d.")
    assert any(note == "c never lost: the rating has no upper end." for note in found.notes)


def test_no_votes_say_what_to_do():
    assert text_report([]) == EMPTY
    assert leaderboard([]).standings == ()


def test_names_cannot_command_a_terminal():
    said = text_report([pair("p", "evil\x1b[2J\nname", "y", "a", annotator="a\rb")])
    assert "\x1b" not in said
    assert "\r" not in said
    assert "evil␛[2J name" in said


def test_the_same_votes_give_the_same_numbers():
    judged = votes(80, 30)
    assert as_json(leaderboard(judged)) == as_json(leaderboard(judged))


def test_statistics_load_neither_torch_nor_gradio():
    code = "import sys, lowrank_rlhf.arena.statistics.report; print(*{'torch', 'gradio', 'peft'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""
