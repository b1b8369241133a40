"""Messages to token ids, the same way for training, scoring and generation.

A text is always prompt ids followed by completion ids, and a whole completion ends *at* its end-of-turn token: chat
templates write a newline after it, but a rollout stops there, and both must be scored on the same tokens.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowrank_rlhf.config import Data
from lowrank_rlhf.data.examples import Messages
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


class Renderer:
    """Renders with the tokenizer's chat template, or with `data.prompt_template` where there is none.

    Args:
        tokenizer: the base's.
        data: the recipe's data group (template and token limits).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data):
        self.tokenizer, self.data = tokenizer, data
        if tokenizer.chat_template is None and "{prompt}" not in data.prompt_template:
            raise UserError("data.prompt_template: must contain {prompt}, this base has no chat template")
        self.end_of_turn = self._end_of_turn()
        self.end_of_turn_id = int(tokenizer.convert_tokens_to_ids(self.end_of_turn))  # type: ignore[arg-type]
        self.stop_ids = sorted({self.end_of_turn_id, int(tokenizer.eos_token_id)})

    def prompt(self, messages: Messages, where: str = "") -> tuple[list[int], bool]:
        """Ids of the prompt up to where the answer begins, keeping its end, and whether a limit cut it."""
        ids = self._encode(self._prompt_text(messages, where))
        limit = self.data.max_prompt_tokens
        return ids[-limit:], len(ids) > limit

    def sequence(self, prompt: Messages, answer: Messages, where: str = "") -> Sequence:
        """Ids of a prompt and its answer; a completion cut by the limit has no end-of-turn token."""
        prompt_ids, prompt_cut = self.prompt(prompt, where)
        ids = self._encode(self._answer_text(prompt, answer, where))
        limit = self.data.max_completion_tokens
        return Sequence(prompt_ids, ids[:limit], prompt_cut or len(ids) > limit)

    def decode(self, ids: list[int]) -> str:
        """The plain text of a completion, without its end-of-turn token."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _encode(self, text: str) -> list[int]:
        # The template writes the special tokens itself; adding the tokenizer's own would double the first
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _prompt_text(self, messages: Messages, where: str) -> str:
        if self.tokenizer.chat_template is None:
            bos = self.tokenizer.bos_token or ""
            return bos + self.data.prompt_template.replace("{prompt}", "\n\n".join(m["content"] for m in messages))
        return self._template(messages, where, add_generation_prompt=True)

    def _answer_text(self, prompt: Messages, answer: Messages, where: str) -> str:
        if self.tokenizer.chat_template is None:
            return "\n\n".join(m["content"] for m in answer) + self.end_of_turn
        before, whole = self._prompt_text(prompt, where), self._template(prompt + answer, where)
        if not whole.startswith(before):
            raise UserError(f"{where}: the chat template renders the prompt differently once it is answered")
        text = whole[len(before) :]
        return text[: text.rindex(self.end_of_turn) + len(self.end_of_turn)]

    def _template(self, messages: Messages, where: str, **options: Any) -> str:
        import jinja2

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
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
