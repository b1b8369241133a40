"""`lowrank-rlhf export`: a role of a run as a folder that plain transformers and PEFT load, compared before it appears.

Every path is the same: what the run says of the probes, the export in a scratch folder, what it says once it is loaded
back, and only then the rename.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.backbone.classifier import with_own_pad, write_classifier
from lowrank_rlhf.backbone.plain import dequantized, load_adapted, load_whole, merge_dtype, save_merged
from lowrank_rlhf.backbone.store import HEAD, WEIGHTS, load_role
from lowrank_rlhf.cards import CHECKS, export_card
from lowrank_rlhf.config import Base, Data
from lowrank_rlhf.data import Renderer, Sequence
from lowrank_rlhf.data.rendering import plain_chat_template
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.export.folder import REPORT, appearing, check_free
from lowrank_rlhf.export.probes import dialogue_sequences, probe_sequences
from lowrank_rlhf.export.verify import (
    BATCH,
    classifier_scores,
    compare_logits,
    compare_scores,
    require,
    text_logits,
)
from lowrank_rlhf.rewards import saved_members
from lowrank_rlhf.runs import load_run_role, read_run, recipe_base_and_data
from lowrank_rlhf.scoring import score_sequences

T = TypeVar("T")
Checks = dict[str, dict[str, float]]
ROLES: tuple[str, ...] = ("reward", "policy", "sft")


@dataclass(frozen=True)
class Export:
    """What to export.

    Attributes:
        role: None takes the first of reward, policy and sft that the run has.
        merge: None exports the adapter. Else a whole 16-bit model: `trained` merges into the values of the 4-bit
            weights that the adapter was trained on, `original` into the base's own.
        overwrite: replace an earlier export.
    """

    run: str
    to: str
    role: Literal["reward", "policy", "sft"] | None = None
    merge: Literal["trained", "original"] | None = None
    overwrite: bool = False


def export(options: Export) -> Path:
    """Write the folder, print how near it is to its run, and return its path.

    An ensemble of reward models becomes one folder for each member, inside.

    Raises:
        UserError: no such run or role; a folder in use; a reward that reads the mean of all tokens; a tokenizer without
            a token to pad with; or an export that does not say what its run says.
    """
    target, run = Path(options.to), Path(options.run)
    check_free(target, options.overwrite)
    info = read_run(run, "RUN")
    base, data = recipe_base_and_data(run, "probes")
    role: str = options.role or next((r for r in ROLES if _weights(run, r).is_file()), "")
    if not role or not _weights(run, role).is_file():
        has = sorted(path.parent.name for path in run.glob(f"adapters/*/{WEIGHTS}"))
        raise UserError(f"--role: {run} has no {role or ' or '.join(ROLES)} to export; its roles: {', '.join(has)}")
    names = saved_members(run) if role == "reward" else [role]
    with appearing(target) as scratch:
        members = [
            _Member(options, info, base, data, name, scratch if len(names) == 1 else scratch / name) for name in names
        ]
        reports = {member.name: member.write() for member in members}
        if len(names) > 1:
            (scratch / "README.md").write_text(_ensemble_card(names), encoding="utf-8")
            (scratch / REPORT).write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    print(f"export: {target}: {role} of {run}", flush=True)
    return target


class _Member:
    """One adapter on its way into one folder."""

    def __init__(self, options: Export, info: dict[str, Any], base: Base, data: Data, name: str, folder: Path):
        self.options, self.info, self.base, self.data, self.name, self.folder = options, info, base, data, name, folder
        self.adapter = Path(options.run, "adapters", name)
        self.is_reward = (self.adapter / HEAD).is_file()
        self.checks: Checks = {}
        folder.mkdir(exist_ok=True)

    def write(self) -> dict[str, Any]:
        """Fill the folder; returns what export.json says."""
        if self.is_reward:
            write_classifier(self.adapter, self.folder)
        else:
            for name in (WEIGHTS, "adapter_config.json"):
                shutil.copyfile(self.adapter / name, self.folder / name)
        self.run = Backbone(self.base)
        load_run_role(self.run, self.options.run, self.name, self.name, key="RUN")
        renderer = Renderer(self.run.tokenizer, self.data, self.run.context)
        self.tokenizer = self._tokenizer(renderer)
        if self.is_reward:
            self._compare_reward(probe_sequences(renderer), renderer.stop_ids)
        else:
            self._compare_policy(dialogue_sequences(renderer), renderer.stop_ids)
        self.tokenizer.save_pretrained(self.folder)
        report = self._report()
        (self.folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        card = export_card(self.name, self.info, report, end_of_turn=renderer.end_of_turn)
        (self.folder / "README.md").write_text(card, encoding="utf-8")
        return report

    def _tokenizer(self, renderer: Renderer) -> PreTrainedTokenizerBase:
        tokenizer = self.run.tokenizer
        if tokenizer.chat_template is None:
            tokenizer.chat_template = plain_chat_template(self.data.prompt_template)
        if not self.is_reward:
            return tokenizer
        embeddings: Any = self.run.model.get_input_embeddings()
        return with_own_pad(tokenizer, renderer.end_of_turn_id, embeddings.weight.shape[0])

    def _compare_reward(self, probes: list[Sequence], stop_ids: list[int]) -> None:
        scores = score_sequences(self.run, self.name, probes, BATCH)
        scale = max(map(abs, scores))
        if self.options.merge is None:
            del self.run
            ours = self._on_full_base(lambda model: score_sequences(model, self.name, probes, BATCH))
            model = load_adapted(self.base, self.folder, torch.float32, pad_token_id=self.tokenizer.pad_token_id)
            right = classifier_scores(model, self.tokenizer, probes, "right")
            self._check("fp32_right_padding", compare_scores(right, ours), scale=scale)
            some = [*range(0, len(probes), BATCH)]  # of every length, so that all but the longest are padded
            left = classifier_scores(model, self.tokenizer, [probes[i] for i in some], "left")
            self._check("fp32_left_padding", compare_scores(left, [ours[i] for i in some]), scale=scale)
            self._check("fp32_and_run", compare_scores(ours, scores), binding=False)
            return
        adapted = self._adapted()
        before = classifier_scores(adapted, self.tokenizer, probes)
        merged = self._merged(adapted, stop_ids)
        after = classifier_scores(merged, self.tokenizer, probes)
        self._check("merged_and_adapter", compare_scores(after, before))
        is_trained = self.options.merge == "trained"
        self._check("merged_and_run", compare_scores(after, scores), binding=is_trained)

    def _compare_policy(self, probes: list[Sequence], stop_ids: list[int]) -> None:
        with self.run.use(self.name) as own:
            logits = text_logits(own, probes)
        scale = max(float(row.abs().max()) for row in logits)
        if self.options.merge is None:
            del self.run, own
            ours = self._on_full_base(lambda full: _role_logits(full, self.name, probes))
            found = compare_logits(ours, text_logits(load_adapted(self.base, self.folder, torch.float32), probes))
            self._check("fp32", found, scale=scale)
            self._check("fp32_and_run", compare_logits(logits, ours), binding=False)
            return
        del own
        adapted = self._adapted()
        before = text_logits(adapted, probes)
        after = text_logits(self._merged(adapted, stop_ids), probes)
        self._check("merged_and_adapter", compare_logits(before, after))
        self._check("merged_and_run", compare_logits(logits, after), binding=False)

    def _on_full_base(self, measure: Callable[[Backbone], T]) -> T:
        """A measurement with our own passes on the base in fp32."""
        backbone = Backbone(dataclasses.replace(self.base, quantization="none"), torch.float32)
        load_role(backbone, self.adapter, self.name, probe=False)
        return measure(backbone)

    def _adapted(self) -> torch.nn.Module:
        """The adapter on 16-bit weights; the run's own model is given up."""
        weights = dequantized(self.run.model) if self.options.merge == "trained" else ()
        pad = self.tokenizer.pad_token_id if self.is_reward else None
        dtype = merge_dtype(self.base.device)
        adapted = load_adapted(self.base, self.folder, dtype, pad_token_id=pad, weights=weights)
        del self.run
        return adapted

    def _merged(self, adapted: torch.nn.Module, stop_ids: list[int]) -> torch.nn.Module:
        """The merged model, written in the place of the adapter and loaded back."""
        for path in self.folder.iterdir():
            path.unlink()
        save_merged(adapted, self.folder, stop_ids)
        return load_whole(self.folder, merge_dtype(self.base.device), self.base.device, classifier=self.is_reward)

    def _check(self, name: str, found: dict[str, float], *, scale: float | None = None, binding: bool = True) -> None:
        figures = ", ".join(f"{key} {value:.3g}" for key, value in found.items())
        print(f"export: {self.name}: {CHECKS[name]}: {figures}{'' if binding else ' (for information)'}", flush=True)
        self.checks[name] = found
        if binding:
            require(CHECKS[name], found, scale=scale)

    def _report(self) -> dict[str, Any]:
        return {
            "role": self.name,
            "stage": self.info["stage"],
            "run": Path(self.options.run).name,
            "base": {key: self.info["base"][key] for key in ("model", "revision", "quantization")},
            "merge": self.options.merge,
            "classifier": self.is_reward,
            "pad_token": self.tokenizer.pad_token,
            "checks": self.checks,
        }


def _role_logits(backbone: Backbone, role: str, probes: list[Sequence]) -> list[torch.Tensor]:
    with backbone.use(role) as model:
        return text_logits(model, probes)


def _weights(run: Path, role: str) -> Path:
    return run / "adapters" / role / WEIGHTS


def _ensemble_card(names: list[str]) -> str:
    lines = [f"- [{name}]({name}/README.md)" for name in names]
    return "\n".join(["# A reward ensemble", "", "Score with each member, then take the mean.", "", *lines, ""])
