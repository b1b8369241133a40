"""Turns to token ids and token ids to text, with limits that are told and never cut in silence."""

import math

from transformers import PreTrainedTokenizerBase

from lowrank_rlhf.arena.votes.records import Decoding, Message
from lowrank_rlhf.config import Data
from lowrank_rlhf.data import Renderer, Sequence
from lowrank_rlhf.errors import UserError

UNLIMITED = 10**9
# No text has more characters per token, so what is longer is refused after reading only its beginning
MOST_CHARACTERS_PER_TOKEN = 64
SAMPLED_CHARACTERS_PER_TOKEN = 8
LARGEST_SEED = 2**63 - 1


class Prompts:
    """Renders the turns of a conversation for one base.

    Args:
        context: tokens that the base attends to, where that has a limit.
        prompt_template: of a base without a chat template.

    Attributes:
        stop_ids: an answer ends at the first of these.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int | None, prompt_template: str):
        data = Data("", prompt_template=prompt_template, max_prompt_tokens=UNLIMITED, max_completion_tokens=UNLIMITED)
        self.tokenizer, self.context = tokenizer, context
        self.renderer = Renderer(tokenizer, data)
        self.stop_ids = self.renderer.stop_ids

    def ids(self, messages: list[Message], decoding: Decoding) -> list[int]:
        """What the speaker reads.

        Raises:
            UserError: nothing is asked, or it and the answer do not fit into the context together; nothing is cut.
        """
        turns = with_system(messages, decoding.system)
        if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
            raise UserError("the prompt is empty: write something to answer")
        limit = None if self.context is None else self.context - decoding.max_new_tokens
        if limit is not None and limit < 1:
            raise UserError(
                f"max tokens: an answer of {decoding.max_new_tokens} tokens leaves no room for a prompt, this base "
                f"attends to {self.context}; lower it"
            )
        self._refuse_longer(turns, limit)
        ids, _ = self.renderer.prompt(turns, "this conversation")
        self._refuse(len(ids), limit, "")
        return ids

    def sequence(self, messages: list[Message], text: str, system: str) -> Sequence:
        """What a reward model reads.

        Raises:
            UserError: it does not fit into the context.
        """
        turns, answer = with_system(messages, system), {"role": "assistant", "content": text}
        _refuse_halves([answer])
        self._refuse_longer([*turns, answer], self.context)
        sequence = self.renderer.sequence(turns, [answer], "this conversation")
        self._refuse(len(sequence.ids), self.context, "")
        return sequence

    def text(self, completion: list[int], *, whole: bool) -> str:
        """The text of a completion. Until it has ended, the bytes of a character that is not complete are held back."""
        text = self.renderer.decode(completion)
        return text if whole else text.rstrip("\N{REPLACEMENT CHARACTER}")

    def _refuse_longer(self, messages: list[Message], limit: int | None) -> None:
        """Refuse what is far too long without tokenising all of it, which takes seconds for a megabyte."""
        if limit is None:
            return
        characters = sum(len(message["content"]) for message in messages)
        if characters <= MOST_CHARACTERS_PER_TOKEN * limit:
            return
        longest = max(messages, key=lambda message: len(message["content"]))["content"]
        sample = longest[: SAMPLED_CHARACTERS_PER_TOKEN * limit]
        tokens = len(self.tokenizer(sample, add_special_tokens=False)["input_ids"])
        self._refuse(max(limit + 1, round(tokens * characters / len(sample))), limit, "about ")

    def _refuse(self, tokens: int, limit: int | None, about: str) -> None:
        if limit is None or tokens <= limit:
            return
        room = "" if limit == self.context else f" less the {self.context - limit} of the answer"  # type: ignore[operator]
        raise UserError(
            f"the conversation is too long: {about}{tokens:,} tokens, and there is room for {limit:,} "
            f"(the {self.context:,} that this base attends to{room}); shorten the prompt, clear the conversation "
            "or lower max tokens"
        )


def with_system(messages: list[Message], system: str) -> list[Message]:
    """The turns with the system prompt before them, where there is one.

    Raises:
        UserError: they have one already, or a message is no text.
    """
    if system.strip():
        if messages and messages[0]["role"] == "system":
            raise UserError("two system prompts: one in the conversation and one in the settings; keep one")
        messages = [{"role": "system", "content": system}, *messages]
    _refuse_halves(messages)
    return messages


def checked_decoding(decoding: Decoding) -> None:
    """
    Raises:
        UserError: a setting is out of bounds; names it.
    """
    if not 0 <= decoding.temperature < math.inf or 0 < decoding.temperature < 1e-3:
        raise UserError(f"temperature: must be 0 (greedy) or at least 0.001, got {decoding.temperature}")
    if not 0 < decoding.top_p <= 1:
        raise UserError(f"top_p: must be above 0 and at most 1, got {decoding.top_p}")
    if decoding.max_new_tokens < 1:
        raise UserError(f"max tokens: must be at least 1, got {decoding.max_new_tokens}")
    if not 0 <= decoding.seed <= LARGEST_SEED:
        raise UserError(f"seed: must be between 0 and {LARGEST_SEED}, got {decoding.seed}")


def _refuse_halves(messages: list[Message]) -> None:
    for message in messages:
        try:
            message["content"].encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError("the text holds half of a character (a lone surrogate); paste it again") from error
