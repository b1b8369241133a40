"""Dialogues that an exported model and its run are compared on: every question with every answer, fitting or not."""

from lowrank_rlhf.data import Renderer, Sequence

QUESTIONS = (
    "How long does it take light from the sun to reach us?",
    "Write a short apology to a customer whose parcel came late.",
    "What is 17 * 23?",
    "Was ist die Hauptstadt von Australien?",
    "I feel tired all the time. What should I do?",
)
ANSWERS = (
    "Light needs about eight minutes and twenty seconds for the 150 million kilometres from the sun to the earth.",
    "We are sorry that your parcel came late. We have refunded the postage, and your next order ships for free.",
    "391",
    "Canberra.",
    "That sounds hard. Try to sleep and eat at regular hours, move a little every day, and see a doctor if it lasts.",
    "I don't know.",
    "as as as an an the the the of of of and and 1. 2. 3. the the",
    "",
)


def probe_sequences(renderer: Renderer) -> list[Sequence]:
    """Every question with every answer, 40 texts, those of one answer together; cut to the run's token limits."""
    return [renderer.sequence(_turn("user", q), _turn("assistant", a), "probe") for a in ANSWERS for q in QUESTIONS]


def dialogue_sequences(renderer: Renderer) -> list[Sequence]:
    """Each question with its own answer, 5 texts: few enough to keep the logits of all."""
    pairs = zip(QUESTIONS, ANSWERS, strict=False)
    return [renderer.sequence(_turn("user", q), _turn("assistant", a), "probe") for q, a in pairs]


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]
