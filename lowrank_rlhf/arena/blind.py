"""What a seat needs of the app, and what keeps names out of what it shows before the vote."""

import sys
from collections.abc import Sequence
from typing import Protocol

from lowrank_rlhf.arena.chat.catalog import BASE, Catalog
from lowrank_rlhf.arena.chat.engine import Engine, Progress
from lowrank_rlhf.arena.study import Item, Study
from lowrank_rlhf.arena.votes.database import Store
from lowrank_rlhf.arena.votes.records import Answer, Comparison

KEPT_BACK = (
    "The models could not answer this prompt. The reason is in the server's log: tell whoever runs this study, or skip "
    "the prompt."
)


class HasModels(Protocol):
    """The app, as far as a seat needs it."""

    catalog: Catalog
    engine: Engine
    store: Store
    study: Study
    reward: str | None


def blind_comparison(item: Item, answers: Sequence[Progress], annotator: str) -> Comparison:
    """What is stored of answers that were generated for an annotator, in the order shown."""
    kept = (
        Answer(
            answer.speaker,
            decoding,
            item.prompt,
            answer.text,
            answer.tokens,
            answer.ended,
            answer.milliseconds,
            answer.first_token_milliseconds,
            beside=item.speakers,
        )
        for decoding, answer in zip(item.decodings, answers, strict=True)
    )
    return Comparison(tuple(kept), annotator, blind=True)


def nameless(message: str, catalog: Catalog, speakers: Sequence[str] = ()) -> str:
    """The message, or where it names a model, a run or a file, one that does not; the server's log has it then.

    Args:
        speakers: names besides the catalog's, of which a scan may have taken some away by now.
    """
    runs = {found.speaker.run for found in catalog.speakers.values()}
    names = {*catalog.speakers, *catalog.rewards, *runs, *speakers} - {"", BASE}
    if any(name in message for name in names) or f"{BASE!r}" in message or "/" in message:
        print(f"vote page: {message}", file=sys.stderr, flush=True)
        return KEPT_BACK
    return message
