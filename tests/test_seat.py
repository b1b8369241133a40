"""One annotator's way through a comparison: who may vote on what, how often, and what is said before the vote."""

from dataclasses import replace

import pytest
from arena_fakes import HASH, SECRETS, App

from lowrank_rlhf.arena.blind import KEPT_BACK
from lowrank_rlhf.arena.seat import Details, Revealed, Seat
from lowrank_rlhf.arena.seats import Seats
from lowrank_rlhf.errors import UserError


@pytest.fixture
def app(tmp_path):
    return App(tmp_path, ["one", "two", "three"])


def shown(app, annotator="ana"):
    seat = Seat(app, annotator)
    seat.next()
    list(seat.stream())
    return seat


def test_answers_grow_together_and_are_stored_with_all_that_reproduces_them(app):
    seat = Seat(app, "ana")
    seat.next()
    assert seat.state == "asked"
    steps = list(seat.stream())
    assert [[len(p.text.split()) for p in step] for step in steps] == [[4, 4], [8, 8], [12, 12], [16, 16]]
    assert seat.state == "shown"
    stored = app.store.comparison(seat.comparison.id)
    assert stored == seat.comparison
    assert stored.blind
    (requests,) = app.engine.asked
    assert tuple(a.decoding for a in stored.answers) == tuple(r.decoding for r in requests)
    assert {a.speaker.adapter_hash for a in stored.answers} == {HASH}
    assert [a.beside for a in stored.answers] == [tuple(r.speaker for r in requests)] * 2
    assert list(seat.stream()) == []


def test_names_are_told_after_the_vote_and_not_before(app):
    seat = shown(app)
    with pytest.raises(UserError, match="after the vote"):
        seat.reveal()
    seat.thumb(0, True)
    seat.better(1, "my own")
    with pytest.raises(UserError, match="after the vote"):
        seat.reveal()
    vote = seat.vote("b", Details(3, ("helpful",), "short"))
    assert (vote.choice, vote.strength, vote.reasons, vote.comment) == ("b", 3, ("helpful",), "short")
    assert seat.reveal() == [Revealed(answer.speaker.name) for answer in seat.comparison.answers]


def test_a_vote_sent_twice_is_one_vote_and_another_is_refused(app):
    seat = shown(app)
    first, again = seat.vote("a"), seat.vote("a")
    assert first == again
    with pytest.raises(UserError, match="another vote has this id"):
        seat.vote("b")
    with pytest.raises(UserError, match="take that vote back first"):
        seat.vote("b", vote_id="other")
    assert [vote.choice for vote in app.store.standing(seat.comparison.id)] == ["a"]


def test_a_vote_that_was_not_acknowledged_is_sent_again_after_a_restart(app):
    seat = shown(app)
    where = seat.comparison.id
    saved = seat.vote("a", vote_id="mine")
    late = Seat(app.restarted(), "ana")
    assert late.vote("a", vote_id="mine", of=where) == saved
    assert app.store.counts()["votes"] == 1


def test_nobody_votes_on_what_was_shown_to_another(app):
    hers = shown(app, "ana").comparison.id
    ben = Seat(app, "ben")
    for act in (
        lambda of: ben.vote("a", of=of),
        lambda of: ben.rank([1, 2], of=of),
        lambda of: ben.thumb(0, True, of=of),
        lambda of: ben.better(0, "text", of=of),
    ):
        with pytest.raises(UserError, match=f"No comparison '{hers}' was shown to ben"):
            act(hers)
        with pytest.raises(UserError, match="No comparison 'no-such' was shown to ben"):
            act("no-such")
        with pytest.raises(UserError, match="nothing to vote on yet"):
            act("")
    assert app.store.counts()["votes"] == 0


def test_an_undone_vote_is_given_again_as_one_that_was_not_blind(app):
    seat = shown(app)
    blind = seat.comparison
    seat.vote("a")
    seat.undo()
    assert app.store.standing(blind.id) == ()
    assert seat.comparison.id != blind.id
    assert seat.comparison.answers == blind.answers
    assert not seat.comparison.blind
    with pytest.raises(UserError, match="after the vote"):
        seat.reveal()
    with pytest.raises(UserError, match="no vote to take back"):
        seat.undo()
    seat.vote("b")
    ((comparison, votes),) = [(j.comparison, j.votes) for j in app.store.judged()]
    assert (comparison.blind, votes[0].choice) == (False, "b")


def test_a_stop_keeps_what_there_is_and_before_any_text_nothing(app):
    seat = Seat(app, "ana")
    seat.next()
    for step in seat.stream():
        if step[0].tokens == 2:
            seat.stop()
    assert seat.state == "shown"
    assert [(len(a.text.split()), a.ended) for a in seat.comparison.answers] == [(8, False)] * 2
    seat.vote("tie")
    seat.next()
    seat.stop()  # while it waits for the model
    list(seat.stream())
    assert (seat.state, seat.comparison) == ("asked", None)
    seat.regenerate()
    list(seat.stream())
    assert seat.state == "shown"


def test_one_seats_stop_is_not_anothers(app):
    ana, ben = Seat(app, "ana"), Seat(app, "ben")
    ana.next(), ben.next()
    ben.stop()
    assert [len(step) for step in ana.stream()] == [2, 2, 2, 2]
    assert ana.comparison.answers[0].ended


@pytest.mark.parametrize("name", [*SECRETS, "marmot-reward", "runs/x/adapter_model.safetensors", "'base'"])
def test_an_error_names_nobody(app, name, capsys):
    app.engine.problem = UserError(f"the weights of {name} are gone")
    seat = Seat(app, "ana")
    seat.next()
    with pytest.raises(UserError) as told:
        list(seat.stream())
    assert str(told.value) == KEPT_BACK
    assert f"the weights of {name} are gone" in capsys.readouterr().err
    assert (seat.state, app.store.counts()["comparisons"]) == ("asked", 0)
    app.engine.problem = None
    list(seat.stream())
    assert seat.state == "shown"


def test_what_nobody_foresaw_is_in_the_log_and_not_on_the_page(app, capsys):
    app.engine.problem = RuntimeError(f"shape of {SECRETS[0]}")
    seat = Seat(app, "ana")
    seat.next()
    with pytest.raises(UserError) as told:
        list(seat.stream())
    assert str(told.value) == KEPT_BACK
    assert f"RuntimeError: shape of {SECRETS[0]}" in capsys.readouterr().err


def test_the_name_of_one_that_a_scan_has_taken_away_is_kept_back_too(app):
    app.engine.problem = UserError(f"the weights of {SECRETS[0]}, {SECRETS[1]} and {SECRETS[2]} are gone")
    seat = Seat(app, "ana")
    seat.next()
    voices = seat.stream()
    next(voices)
    app.catalog = replace(app.catalog, speakers={})
    with pytest.raises(UserError) as told:
        list(voices)
    assert str(told.value) == KEPT_BACK


@pytest.mark.parametrize("go_on", [Seat.next, Seat.regenerate])
def test_one_that_cannot_answer_does_not_stop_the_study(app, go_on):
    broken, answer = SECRETS[0], app.engine.stream

    def stream(requests, stop):
        if broken in [request.speaker for request in requests]:
            raise UserError(f"the weights of {broken} are gone")
        return answer(requests, stop)

    app.engine.stream = stream
    failed, seat = 0, Seat(app, "ana")
    while app.store.counts()["comparisons"] < 3 and failed < 12:
        go_on(seat) if seat.state == "asked" else seat.next()
        try:
            list(seat.stream())
            seat.vote("a")
        except UserError:
            failed += 1
    assert 0 < failed < 8
    assert app.store.counts()["pair"] == 3
    assert app.study.progress("ana") == (3, 3)


def test_an_error_about_the_prompt_is_told_as_it_is(app):
    app.engine.problem = UserError("this conversation has 900000 tokens, this base attends to 8192")
    seat = Seat(app, "ana")
    seat.ask("x" * 10)
    with pytest.raises(UserError, match="900000 tokens"):
        list(seat.stream())


def test_regenerating_asks_the_same_models_with_other_seeds(app):
    seat = shown(app)
    before = seat.comparison
    seat.regenerate()
    list(seat.stream())
    one, two = app.engine.asked
    assert sorted(r.speaker for r in one) == sorted(r.speaker for r in two)
    assert {r.decoding.seed for r in one}.isdisjoint(r.decoding.seed for r in two)
    assert seat.comparison.id != before.id
    seat.vote("a")
    with pytest.raises(UserError, match="nothing to answer again"):
        seat.regenerate()


def test_scores_come_after_the_vote(tmp_path):
    app = App(tmp_path, ["one"], reward="marmot-reward")
    seat = shown(app)
    seat.score()
    assert app.engine.scored == []
    seat.vote("a")
    seat.score()
    assert [who.score for who in seat.reveal()] == [len(a.text) / 7 for a in seat.comparison.answers]
    assert app.store.comparison(seat.comparison.id).answers[0].scored_by == "marmot-reward"
    seat.score()
    assert len(app.engine.scored) == 2


def test_a_ranking_of_several(tmp_path):
    app = App(tmp_path, ["one"], samples=3)
    seat = shown(app)
    assert len(seat.comparison.answers) == 3
    with pytest.raises(UserError, match="a choice needs 2 answers"):
        seat.vote("a")
    assert seat.rank([2, 1, 2]).ranking == (2, 1, 2)
    assert seat.state == "voted"


@pytest.mark.parametrize("index", [-1, 2, True, "0"])
def test_an_answer_that_is_not_there(app, index):
    seat = shown(app)
    with pytest.raises(UserError, match="There is no answer"):
        seat.thumb(index, True)


def test_a_session_has_one_seat_per_name(app):
    seats = Seats(app)
    ana = seats.of("session", " ana ")
    assert ana is seats.of("session", "ana")
    assert ana.annotator == "ana"
    assert ana is not seats.of("session", "ben")
    assert ana is not seats.of("other", "ana")
    with pytest.raises(UserError, match="the name is empty"):
        seats.of("session", " ")


def test_a_prompt_of_ones_own(app):
    seat = shown(app)
    with pytest.raises(UserError, match="The prompt is empty"):
        seat.ask(" \n")
    assert seat.state == "shown"
    seat.ask("my \ud800 question")
    list(seat.stream())
    assert seat.comparison.prompt == ({"role": "user", "content": "my ? question"},)
    assert seat.vote("a") == replace(seat.voted)
