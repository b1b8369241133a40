"""Dialogues that an exported model and its run are compared on: every question with every answer, fitting or not."""

from lowrank_rlhf.data import Renderer, Sequence

QUESTIONS = (
    "How long does it take light from the sun to reach us?",
    "Write a short apology to a customer whose parcel came late.",
    "Explain recursion to a ten-year-old.",
    "What is 17 * 23?",
    "Was ist die Hauptstadt von Australien?",
    "I feel tired all the time. What should I do?",
    "Give me three names for a cat.",
    "Why do leaves turn red in autumn?",
)
ANSWERS = (
    "Light needs about eight minutes and twenty seconds for the 150 million kilometres from the sun to the earth.",
    "We are sorry that your parcel came late. We have refunded the postage, and your next order ships for free.",
    "Imagine a box that holds a smaller box, and that one a smaller box again. You open each in the same way until "
    "you find one that is empty. A function that calls itself on a smaller problem works like this.",
    "391",
    "Canberra.",
    "That sounds hard. Try to sleep and eat at regular hours, move a little every day, and see a doctor if it lasts.",
    "I don't know.",
    "as as as an an the the the of of of and and 1. 2. 3. the the",
)


def probe_sequences(renderer: Renderer) -> list[Sequence]:
    """Every question with every answer, 64 texts, cut to the run's token limits."""
    return [renderer.sequence(_turn("user", q), _turn("assistant", a), "probe") for q in QUESTIONS for a in ANSWERS]


def dialogue_sequences(renderer: Renderer) -> list[Sequence]:
    """Each question with its own answer, 8 texts: few enough to keep the logits of all."""
    pairs = zip(QUESTIONS, ANSWERS, strict=True)
    return [renderer.sequence(_turn("user", q), _turn("assistant", a), "probe") for q, a in pairs]


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]
