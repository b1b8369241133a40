"""Messages to token ids, the same way for training, scoring and generation.

A text is always prompt ids followed by completion ids, and a whole completion ends *at* its end-of-turn token: chat
templates write a newline after it, but a rollout stops there, and both must be scored on the same tokens.

Where an answer begins and ends is found by rendering the dialogue up to it and up to its end, and each rendering must
begin with the one before. So templates need no `{% generation %}` marks, and one that rewrites earlier turns is told.
"""

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowrank_rlhf.config import Data
from lowrank_rlhf.data.examples import Messages
from lowrank_rlhf.data.template_date import DAY, dated_template
from lowrank_rlhf.errors import UserError


@dataclass(frozen=True)
class Sequence:
    """Token ids of a prompt and its completion. `cut`: a limit cut the prompt or the completion."""

    prompt_ids: list[int]
    completion_ids: list[int]
    cut: bool = False

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.completion_ids


@dataclass(frozen=True)
class Demonstration:
    """Token ids of a dialogue and which of them are learned. `cut`: a limit cut the prompt or the last answer."""

    input_ids: list[int]
    completion_mask: list[bool]
    cut: bool = False


class Renderer:
    """Renders with the tokenizer's chat template, or with `data.prompt_template` where there is none.

    Args:
        tokenizer: the base's.
        data: the recipe's data group (template and token limits).
        context: tokens that the base can attend to, where that has a limit.

    Raises:
        UserError: the token limits do not fit into the context, or the template cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data, context: int | None = None):
        self.tokenizer, self.data = tokenizer, data
        longest = data.max_prompt_tokens + data.max_completion_tokens
        if context is not None and longest > context:
            raise UserError(
                f"data.max_prompt_tokens + data.max_completion_tokens: {longest} tokens, but this base attends to at "
                f"most {context}; lower one of them"
            )
        if tokenizer.chat_template is None and "{prompt}" not in data.prompt_template:
            raise UserError("data.prompt_template: must contain {prompt}, this base has no chat template")
        self.dated = dated_template(tokenizer)
        self.end_of_turn = self._end_of_turn()
        self.end_of_turn_id = int(tokenizer.convert_tokens_to_ids(self.end_of_turn))  # type: ignore[arg-type]
        self.stop_ids = sorted({self.end_of_turn_id, int(tokenizer.eos_token_id)})

    @property
    def template_date(self) -> str | None:
        """The day that the chat template writes as today's, whenever it is; None where it writes none."""
        return DAY.date().isoformat() if self.dated else None

    def prompt(self, messages: Messages, where: str = "") -> tuple[list[int], bool]:
        """Ids of the prompt up to where the answer begins, keeping its end, and whether a limit cut it."""
        ids = self._encode(self._template(messages, where, add_generation_prompt=True))
        limit = self.data.max_prompt_tokens
        return ids[-limit:], len(ids) > limit

    def sequence(self, prompt: Messages, answer: Messages, where: str = "") -> Sequence:
        """Ids of a prompt and its answer; a completion cut by the limit has no end-of-turn token."""
        prompt_ids, prompt_cut = self.prompt(prompt, where)
        ids = self._encode(self._turn(prompt + answer, where, start=len(prompt))[1])
        limit = self.data.max_completion_tokens
        return Sequence(prompt_ids, ids[:limit], prompt_cut or len(ids) > limit)

    def demonstration(self, prompt: Messages, answer: Messages, where: str = "") -> Demonstration:
        """Ids of a dialogue; learned are its last answer or, with `data.loss_on: all`, every assistant's turn.

        Each learned turn includes its end-of-turn token, and the text ends at the last one. `max_prompt_tokens`
        counts everything before the last answer, and keeps its end.

        Raises:
            UserError: the template refuses the dialogue or renders a turn differently once the dialogue goes on.
        """
        messages = prompt + answer
        # A greeting that opens the dialogue answers nothing, and templates refuse to render what stands before it
        turns = [i for i, message in enumerate(messages) if i > 0 and message["role"] == "assistant"]
        learned = turns if self.data.loss_on == "all" else turns[-1:]
        ids: list[int] = []
        mask: list[bool] = []
        done, start = "", 0
        for i in learned:
            before, text = self._turn(messages[: i + 1], where)
            if not before.startswith(done):
                raise UserError(
                    f"{where}: the chat template renders the messages before number {i + 1} differently once the "
                    "dialogue goes on, so learned tokens cannot be told apart; use data.loss_on: last"
                )
            between = self._encode(before[len(done) :])
            start = len(ids) + len(between)
            said = self._encode(text)
            ids += between + said
            mask += [False] * len(between) + [True] * len(said)
            done = before + text
        first = max(0, start - self.data.max_prompt_tokens)
        last = start + self.data.max_completion_tokens
        return Demonstration(ids[first:last], mask[first:last], cut=first > 0 or last < len(ids))

    def decode(self, ids: list[int]) -> str:
        """The plain text of a completion, without its end-of-turn token."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def text(self, ids: list[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def _encode(self, text: str) -> list[int]:
        # The template writes the special tokens itself; adding the tokenizer's own would double the first
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _turn(self, messages: Messages, where: str, start: int = -1) -> tuple[str, str]:
        """The text before the answer `messages[start:]`, and the answer's up to its last end-of-turn token."""
        before, whole = (
            self._template(messages[:start], where, add_generation_prompt=True),
            self._template(messages, where),
        )
        if not whole.startswith(before):
            raise UserError(f"{where}: the chat template renders the prompt differently once it is answered")
        text = whole[len(before) :]
        end = text.rfind(self.end_of_turn)
        if end < 0:
            raise UserError(f"{where}: the chat template does not end this answer with {self.end_of_turn}")
        return before, text[: end + len(self.end_of_turn)]

    def _plain(self, messages: Messages) -> str:
        """What a base without a chat template reads: each question in `data.prompt_template`, each answer with eos."""
        text = str(self.tokenizer.bos_token or "")
        asked: list[str] = []
        for message in messages:
            if message["role"] == "assistant":
                text += self._question(asked) + message["content"] + self.end_of_turn
                asked = []
            else:
                asked.append(message["content"])
        return text + self._question(asked)

    def _question(self, asked: list[str]) -> str:
        return self.data.prompt_template.replace("{prompt}", "\n\n".join(asked)) if asked else ""

    def _template(self, messages: Messages, where: str, **options: Any) -> str:
        import jinja2

        if self.tokenizer.chat_template is None:
            return self._plain(messages)
        try:
            text = self.tokenizer.apply_chat_template(messages, chat_template=self.dated, tokenize=False, **options)
            return str(text)
        except jinja2.TemplateError as error:
            raise UserError(f"{where}: the chat template refuses this dialogue: {error}") from error

    def _end_of_turn(self) -> str:
        """The token that ends an assistant turn: what the template writes right behind the answer."""
        if self.tokenizer.chat_template is None:
            return str(self.tokenizer.eos_token)
        prompt, answer = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "bbb"}]
        behind = self._template(prompt + answer, "").rpartition("bbb")[2]
        ids = self._encode(behind)
        if ids and ids[0] in self.tokenizer.all_special_ids + list(self.tokenizer.added_tokens_decoder):
            return str(self.tokenizer.convert_ids_to_tokens(ids[0]))
        raise UserError("base.model: the chat template does not end an assistant turn with a special token")


def plain_chat_template(prompt_template: str) -> str:
    """What `Renderer` reads of a base without a chat template, as a chat template for its tokenizer.

    >>> plain_chat_template("Q: {prompt}\\nA: ")[:43]
    '{{ bos_token or "" }}{% set ns = namespace('
    """
    question = json.dumps(prompt_template, ensure_ascii=False) + " | replace('{prompt}', ns.asked | join('\n\n'))"
    ask = "{% if ns.asked %}{{ " + question + " }}{% endif %}"
    return (
        '{{ bos_token or "" }}{% set ns = namespace(asked=[]) %}{% for message in messages %}'
        "{% if message['role'] == 'assistant' %}"
        + ask
        + "{{ message['content'] + eos_token }}{% set ns.asked = [] %}"
        + "{% else %}{% set ns.asked = ns.asked + [message['content']] %}{% endif %}{% endfor %}"
        + ask
    )
