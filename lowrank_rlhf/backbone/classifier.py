"""A reward role as the adapter of a sequence classifier with one label, which plain transformers and PEFT load."""

import copy
from pathlib import Path

from peft import LoraConfig, PeftConfig, TaskType
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from lowrank_rlhf.backbone.store import HEAD, SCORE, WEIGHTS, saved_pooling
from lowrank_rlhf.errors import UserError

PAD = "<|pad|>"
RESERVED = ("pad", "reserved", "unused")


def write_classifier(adapter: Path, target: Path) -> None:
    """The adapter and head of a saved reward role as one SEQ_CLS adapter: the head becomes the layer `score`.

    Raises:
        UserError: the head reads the mean of all tokens, which no sequence classifier of transformers does.
    """
    if saved_pooling(adapter) == "mean":
        raise UserError(
            f"{adapter}: its head reads the mean of all tokens (reward_model.pooling: mean), and sequence classifiers "
            "read the last token only, so this reward model cannot be exported; train one with pooling: last"
        )
    config = PeftConfig.from_pretrained(str(adapter))
    assert isinstance(config, LoraConfig)
    config.task_type = TaskType.SEQ_CLS
    config.modules_to_save = ["score"]
    config.save_pretrained(str(target))
    weights = load_file(adapter / WEIGHTS)
    save_file({**weights, SCORE: load_file(adapter / HEAD)["linear.weight"]}, target / WEIGHTS)


def with_own_pad(
    tokenizer: PreTrainedTokenizerBase, end_of_turn_id: int, embedding_rows: int
) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that pads with a token in which no text ends.

    Sequence classifiers read the state of the rightmost token that is not `pad_token_id`. Texts end in their
    end-of-turn token, which often is eos and pad at once, and would be read one token early.

    Its own pad token where that ends no text; else a reserved or unused special token; else a new one, if the
    embedding has a row to spare; else a special token that neither the template nor the tokenizer uses; else the one
    that only opens a turn.

    Raises:
        UserError: there is none.
    """
    tokenizer = copy.deepcopy(tokenizer)
    ending = {end_of_turn_id, tokenizer.eos_token_id}
    if tokenizer.pad_token_id not in {*ending, tokenizer.bos_token_id, tokenizer.unk_token_id, None}:
        return tokenizer
    special = {
        int(i): str(token)
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special and i < embedding_rows and i not in ending
    }
    used = {tokenizer.bos_token_id, tokenizer.unk_token_id}
    free = {i: t for i, t in special.items() if i not in used and t not in (tokenizer.chat_template or "")}
    reserved = [i for i, token in free.items() if any(word in token.lower() for word in RESERVED)]
    if not reserved and len(tokenizer) < embedding_rows:
        tokenizer.add_special_tokens({"pad_token": PAD})
        return tokenizer
    chosen = reserved or list(free)[-1:] or [i for i in special if i == tokenizer.bos_token_id]
    if not chosen:
        raise UserError(
            "base.model: its tokenizer has no special token in which no text ends, and its embedding no row for one, "
            "so a sequence classifier could not tell padding from the end of a text; score with lowrank-rlhf score"
        )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen[0])
    return tokenizer
