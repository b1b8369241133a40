"""Columns side by side: their turns, their seeds, blind shuffles, stops and errors, and the record that is voted on."""

import copy
import math
from types import SimpleNamespace

import pytest

from lowrank_rlhf.arena.chat.conversation import Conversation
from lowrank_rlhf.arena.chat.engine import Progress
from lowrank_rlhf.arena.votes.records import Decoding, Speaker
from lowrank_rlhf.errors import UserError

PLAIN = Decoding(seed=5)


class Echo:
    """Says "NAME:PROMPT#SEED" letter by letter; notes the requests of each call."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at, self.closed = [], fails_at, 0

    def stream(self, requests, stop):
        self.calls.append(requests)
        texts = [f"{r.speaker}:{r.messages[-1]['content']}#{r.decoding.seed}" for r in requests]
        by = [Speaker(r.speaker, run=r.speaker, adapter_hash=f"hash of {r.speaker}") for r in requests]
        try:
            for count in range(1, max(map(len, texts)) + 1):
                if stop():
                    said = [t[: count - 1] for t in texts]
                    yield [Progress(t, count - 1, done=True, stopped=True, speaker=s) for t, s in zip_(said, by)]
                    return
                if count == self.fails_at:
                    raise UserError("out of memory")
                done = [count >= len(t) for t in texts]
                yield [
                    Progress(t[:count], count, 100 * count, 100, d, d, speaker=s) for t, d, s in zip_(texts, done, by)
                ]
        finally:
            self.closed += 1


def zip_(*lists):
    return zip(*lists, strict=True)


def conversation_of(*names, blind=False, seed=None):
    conversation = Conversation()
    conversation.settle([(name, PLAIN) for name in names], blind, seed=seed)
    return conversation


def said(conversation):
    return [[message["content"] for message in column.messages] for column in conversation.columns]


def run(generator):
    return list(generator)


def test_all_columns_are_asked_in_one_stream_and_answer_turn_after_turn():
    engine, conversation = Echo(), conversation_of("a", "bb")
    grown = run(conversation.say("hi", engine))
    assert [answer.text for answer in grown[0]] == ["a", "b"]
    assert [answer.text for answer in grown[-1]] == ["a:hi#5", "bb:hi#5"]
    run(conversation.say("more", engine))
    assert said(conversation) == [["hi", "a:hi#5", "more", "a:more#5"], ["hi", "bb:hi#5", "more", "bb:more#5"]]
    assert len(engine.calls) == 2  # one mixed batch a turn, not one per column
    assert [len(request.messages) for request in engine.calls[1]] == [3, 3]


def test_two_hundred_turns_are_all_kept():
    engine, conversation = Echo(), conversation_of("a", "b")
    for turn in range(200):
        run(conversation.say(str(turn), engine))
    assert conversation.turns == 200
    assert said(conversation)[1][398:] == ["199", "b:199#5"]


@pytest.mark.parametrize("prompt", ["", "  \n\t"])
def test_an_empty_prompt_is_refused_and_changes_nothing(prompt):
    conversation = conversation_of("a", "b")
    run(conversation.say("hi", Echo()))
    before = copy.deepcopy(said(conversation))
    conversation.begin()
    with pytest.raises(UserError, match="prompt is empty"):
        run(conversation.say(prompt, Echo()))
    assert said(conversation) == before
    assert not conversation.busy


def test_an_error_leaves_the_conversation_as_it_was():
    conversation = conversation_of("a", "b")
    run(conversation.say("hi", Echo()))
    before = copy.deepcopy(conversation.__dict__)
    conversation.begin()
    with pytest.raises(UserError, match="out of memory"):
        run(conversation.say("more", Echo(fails_at=3)))
    assert copy.deepcopy(conversation.__dict__) == before
    run(conversation.say("again", Echo()))
    assert said(conversation)[0][2:] == ["again", "a:again#5"]


def test_an_iterator_closed_early_closes_the_stream_and_keeps_nothing():
    engine, conversation = Echo(), conversation_of("a", "b")
    answers = conversation.say("hi", engine)
    next(answers)
    answers.close()
    assert engine.closed == 1
    assert said(conversation) == [[], []]
    assert not conversation.busy


def test_a_stop_keeps_what_was_written_and_reaches_only_its_own_conversation():
    stopped, other = conversation_of("a", "b"), conversation_of("a", "b")
    one, two = stopped.say("hi", Echo()), other.say("hi", Echo())
    for _ in range(3):
        next(one), next(two)
    stopped.stop()
    assert run(one)[-1][0].stopped
    assert run(two)[-1][0].text == "a:hi#5"
    assert said(stopped) == [["hi", "a:h"], ["hi", "b:h"]]
    assert said(other)[0] == ["hi", "a:hi#5"]
    assert stopped.comparison("me").answers[0].ended is False


def test_a_stop_before_any_text_takes_the_turn_back_and_the_next_one_is_not_stopped():
    conversation = conversation_of("a")
    conversation.begin()
    conversation.stop()
    run(conversation.say("hi", Echo()))
    assert said(conversation) == [[]]
    conversation.stop()  # nothing is being written: this must not reach the next turn
    run(conversation.say("hi", Echo()))
    assert said(conversation) == [["hi", "a:hi#5"]]


def test_a_stop_while_nobody_has_been_asked_yet_frees_the_conversation():
    conversation = conversation_of("a")
    run(conversation.say("hi", Echo()))
    conversation.begin("more")  # and whoever was to ask is dropped from the queue
    conversation.stop()
    assert not conversation.busy
    assert conversation.undo() == "hi"
    conversation.begin("again")
    run(conversation.say("again", Echo()))
    assert said(conversation) == [["again", "a:again#5"]]


def test_a_stop_of_running_answers_frees_nothing_before_they_have_ended():
    conversation = conversation_of("a")
    conversation.begin("hi")
    answers = conversation.say("hi", Echo())
    next(answers)
    conversation.stop()
    with pytest.raises(UserError, match="still being written"):
        conversation.begin("more")
    run(answers)
    assert not conversation.busy


def test_regenerating_answers_the_same_prompt_with_the_next_seed():
    engine, conversation = Echo(), conversation_of("a", "b")
    run(conversation.say("hi", engine))
    run(conversation.regenerate(engine))
    run(conversation.regenerate(engine))
    assert said(conversation) == [["hi", "a:hi#7"], ["hi", "b:hi#7"]]
    assert [answer.decoding.seed for answer in conversation.comparison("me").answers] == [7, 7]
    run(conversation.say("next", engine))
    assert said(conversation)[0][-1] == "a:next#5"


def test_regenerating_nothing_is_refused():
    conversation = conversation_of("a", "b")
    conversation.begin()
    with pytest.raises(UserError, match="nothing to answer again"):
        run(conversation.regenerate(Echo()))
    assert not conversation.busy


def test_undo_gives_the_prompt_back_and_clear_keeps_who_answers():
    conversation = conversation_of("a", "b")
    for prompt in ("one", "two"):
        run(conversation.say(prompt, Echo()))
    assert conversation.undo() == "two"
    assert said(conversation) == [["one", "a:one#5"], ["one", "b:one#5"]]
    with pytest.raises(UserError, match="nothing to vote on"):
        conversation.comparison("me")
    assert conversation.undo() == "one"
    assert conversation.undo() == ""
    run(conversation.say("one", Echo()))
    conversation.clear()
    assert said(conversation) == [[], []]
    assert [column.speaker for column in conversation.columns] == ["a", "b"]


def test_nothing_changes_while_answers_are_being_written():
    conversation = conversation_of("a", "b")
    conversation.begin()
    for change in (
        conversation.begin,
        conversation.undo,
        conversation.clear,
        lambda: conversation.adopt(0),
        lambda: conversation.settle([("c", PLAIN)]),
        lambda: conversation.comparison("me"),
    ):
        with pytest.raises(UserError, match="still being written"):
            change()


def test_columns_come_and_go_with_their_turns():
    conversation = conversation_of("a", "b")
    run(conversation.say("hi", Echo()))
    conversation.settle([("a", PLAIN), ("b", PLAIN), ("c", PLAIN)])
    assert [len(column.messages) for column in conversation.columns] == [2, 2, 0]
    with pytest.raises(UserError, match="nothing to answer again"):
        run(conversation.regenerate(Echo()))
    run(conversation.say("more", Echo()))
    assert [len(column.messages) for column in conversation.columns] == [4, 4, 2]
    assert conversation.comparison("me").prompt is None  # the third was not asked the same
    conversation.settle([("a", PLAIN)])
    assert said(conversation) == [["hi", "a:hi#5", "more", "a:more#5"]]


@pytest.mark.parametrize("count", [0, 5])
def test_no_columns_and_five_are_refused(count):
    with pytest.raises(UserError, match="1 to 4 columns"):
        Conversation().settle([("a", PLAIN)] * count)


def test_the_record_says_all_that_reproduces_the_answers():
    conversation = Conversation()
    settings = [("a", Decoding(0.1, 0.2, 3, 4, "be kind")), ("b", PLAIN)]
    conversation.settle(settings)
    run(conversation.say("hi", Echo()))
    conversation.score("judge", lambda run, messages, text, system: float(len(run + text + system)))
    comparison = conversation.comparison("me")
    first, second = comparison.answers
    assert first.decoding == settings[0][1]
    assert first.prompt == ({"role": "user", "content": "hi"},)
    assert (first.text, first.tokens, first.ended) == ("a:hi#4", 6, True)
    assert (first.milliseconds, first.first_token_milliseconds) == (600, 100)
    assert first.speaker.adapter_hash == "hash of a"
    assert first.beside == second.beside == ("a", "b")
    assert (first.score, second.score) == (5 + 6 + 7, 5 + 6 + 0)
    assert first.scored_by == "judge"
    assert comparison.prompt == first.prompt
    assert not comparison.blind
    assert conversation.comparison("me") is comparison  # a second vote is on the same record
    other = conversation.comparison("you")
    assert other.id != comparison.id
    assert conversation.comparison("me") is comparison  # also by turns
    assert conversation.comparison("you") is other
    run(conversation.regenerate(Echo()))
    assert conversation.comparison("me").id != comparison.id


def test_scores_are_of_one_turn_only():
    conversation = conversation_of("a", "b")
    run(conversation.say("hi", Echo()))
    conversation.score("judge", lambda *_: 1.0)
    run(conversation.say("more", Echo()))
    assert [(a.score, a.scored_by) for a in conversation.comparison("me").answers] == [(None, None)] * 2


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_refused_and_those_before_stay(broken):
    conversation = conversation_of("a", "b")
    run(conversation.say("hi", Echo()))
    conversation.score("judge", lambda *_: 1.0)
    with pytest.raises(UserError, match="diverged: its scores are"):
        conversation.score("diverged", lambda run, messages, text, system: broken if text[0] == "b" else 2.0)
    assert [(a.score, a.scored_by) for a in conversation.comparison("me").answers] == [(1.0, "judge")] * 2


def test_who_answered_is_what_came_with_the_answer_and_is_not_asked_again():
    """By the end of an answer another one may have loaded other weights under the same name."""
    engine, conversation = Echo(), conversation_of("a")
    engine.speaker = None
    run(conversation.say("hi", engine))
    (answer,) = conversation.comparison("me").answers
    assert (answer.speaker.adapter_hash, answer.beside) == ("hash of a", ("a",))


def test_a_blind_conversation_is_shuffled_once_and_keeps_each_side_with_its_speaker():
    orders = set()
    for seed in range(20):
        conversation = conversation_of("a", "b", blind=True, seed=seed)
        assert conversation.hidden
        first = [column.speaker for column in conversation.columns]
        orders.add(tuple(first))
        run(conversation.say("hi", Echo()))
        conversation.settle([("a", PLAIN), ("b", PLAIN)], blind=True, seed=seed + 1)
        run(conversation.say("more", Echo()))
        assert [column.speaker for column in conversation.columns] == first
        assert [texts[1][0] for texts in said(conversation)] == first
        assert conversation.comparison("me").blind
    assert orders == {("a", "b"), ("b", "a")}


def test_after_the_reveal_the_next_blind_prompt_starts_anew():
    conversation = conversation_of("a", "b", blind=True)
    run(conversation.say("hi", Echo()))
    conversation.reveal()
    assert not conversation.hidden
    run(conversation.regenerate(Echo()))
    assert not conversation.comparison("me").blind  # its names are known by now
    conversation.settle([("a", PLAIN), ("b", PLAIN)], blind=True)
    assert said(conversation) == [[], []]
    assert conversation.hidden


def test_nobody_votes_again_on_blind_answers_whose_names_are_known():
    conversation = conversation_of("a", "b", blind=True)
    run(conversation.say("hi", Echo()))
    assert conversation.comparison("me").blind
    conversation.reveal()
    for name in ("me", "you"):
        with pytest.raises(UserError, match="send the next prompt"):
            conversation.comparison(name)


def test_an_open_conversation_can_be_voted_on_again_and_has_nothing_to_reveal():
    conversation = conversation_of("a", "b")
    run(conversation.say("hi", Echo()))
    comparison = conversation.comparison("me")
    conversation.reveal()
    assert conversation.comparison("me") is comparison
    assert not conversation.revealed


def test_after_a_blind_conversation_the_open_one_is_in_the_order_of_its_settings():
    for seed in range(8):
        conversation = conversation_of("a", "b", "c", blind=True, seed=seed)
        run(conversation.say("hi", Echo()))
        conversation.settle([("a", PLAIN), ("b", PLAIN), ("c", PLAIN)])
        assert [column.speaker for column in conversation.columns] == ["a", "b", "c"]
        assert conversation.names == ["a", "b", "c"]


def test_asking_for_blindness_later_starts_anew():
    conversation = conversation_of("a", "b")
    run(conversation.say("hi", Echo()))
    conversation.settle([("a", PLAIN), ("b", PLAIN)], blind=True)
    assert said(conversation) == [[], []]


def test_going_on_from_one_side_makes_the_next_answers_comparable():
    conversation = conversation_of("a", "b")
    run(conversation.say("hi", Echo()))
    run(conversation.say("more", Echo()))
    assert conversation.comparison("me").prompt is None
    conversation.adopt(1)
    run(conversation.say("last", Echo()))
    assert [m["content"] for m in conversation.comparison("me").prompt] == ["hi", "b:hi#5", "more", "b:more#5", "last"]
    conversation.columns[0].messages.pop()
    assert len(conversation.columns[1].messages) == 6  # the columns share no list


def test_half_a_surrogate_pair_in_a_prompt_becomes_a_question_mark():
    conversation = conversation_of("a")
    run(conversation.say("x\ud800y", Echo()))
    assert said(conversation)[0][0] == "x?y"


def test_a_conversation_can_be_copied_as_a_session_state_is():
    conversation = conversation_of("a", "b")
    run(conversation.say("hi", Echo()))
    assert said(copy.deepcopy(conversation)) == said(conversation)


def test_an_engine_that_stops_while_waiting_yields_no_text():
    """The engine says that every answer was stopped before it had a turn; `done` and no text."""
    conversation = conversation_of("a", "b")
    engine = SimpleNamespace(
        stream=lambda requests, stop: iter([[Progress(done=True, stopped=True)] * len(requests)]), speaker=None
    )
    conversation.begin()
    conversation.stop()
    run(conversation.say("hi", engine))
    assert said(conversation) == [[], []]
