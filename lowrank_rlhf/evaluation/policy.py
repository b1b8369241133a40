"""Compare policies on the same prompts with the same seed: reward, gold, KL, win rates and what the texts are like.

OUT/report.md, report.json   every figure with its 95 % interval by prompt, and the differences
OUT/answers.jsonl            every answer with its scores
OUT/scores.png, frontier.png reward and gold with intervals, and over KL
"""

import dataclasses
import json
import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lowrank_rlhf.backbone import Backbone
from lowrank_rlhf.config import Data, RewardSource
from lowrank_rlhf.data import Example, Examples, Renderer, load_prompts
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.evaluation.answers import MICRO_BATCH, Answers, measure_answers, sample_answers
from lowrank_rlhf.evaluation.charts import plot_report
from lowrank_rlhf.evaluation.judges import Judge, Judged, load_function, load_judge
from lowrank_rlhf.evaluation.roster import Key, Policy, Roster, read_roster
from lowrank_rlhf.evaluation.summary import PolicyReport, Report, summarise, summarise_wins
from lowrank_rlhf.evaluation.tables import as_json, markdown, print_report
from lowrank_rlhf.rewards import AdapterReward, Reward, Weighted, WeightedSum, load_members
from lowrank_rlhf.runs import unused_run_dir, write_atomic
from lowrank_rlhf.samples import prompt_value


@dataclass(frozen=True)
class PolicyEvaluation:
    """Whom to compare, on what, and who judges. The same values give the same figures on the same machine.

    Attributes:
        runs: their policy, else sft adapters answer beside the bare base.
        prompts: a file in any data format; answers in it are ignored.
        format, columns, on_bad_row: of the prompts, as in a recipe's data group.
        reward_from: a reward run; with `reward` (`module:function`, verifier or server) the two add up.
        gold: scores likewise, told apart from the reward that trained.
        judge: reward, a verifier, `module:function` or a URL; None is the reward where there is one.
        against: base, a run, or start: what each policy's training started from.
        max_new_tokens: None is the highest limit that the runs were trained with.
        batch_size: answers sampled together.
        out: a folder that is empty or not there; None is an unused runs/evaluation-N.

    Raises:
        UserError: a value out of bounds.
    """

    runs: tuple[str, ...]
    prompts: str
    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    on_bad_row: Literal["error", "skip"] = "error"
    reward_from: str | None = None
    reward: str | None = None
    gold: str | None = None
    judge: str | None = None
    judge_model: str | None = None
    against: str = "base"
    samples: int = 1
    seed: int = 0
    temperature: float = 1.0
    max_new_tokens: int | None = None
    batch_size: int = 32
    out: str | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"--samples: must be at least 1, got {self.samples}")
        if self.batch_size < 1:
            raise UserError(f"--batch-size: must be at least 1, got {self.batch_size}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens: must be at least 1, got {self.max_new_tokens}")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"--temperature: must be above 0, got {self.temperature}")


def evaluate_policies(settings: PolicyEvaluation) -> Path:
    """What `lowrank-rlhf evaluate policy` does; returns the folder of the report."""
    return compare_policies(settings, read_prompts(settings))


def read_prompts(settings: PolicyEvaluation) -> Examples:
    """The prompts, each once.

    Raises:
        UserError: a row does not fit, unless `on_bad_row` is skip, or none does.
    """
    how = {name: getattr(settings, name) for name in ("format", "columns", "on_bad_row")}
    return load_prompts(Data(settings.prompts, eval_fraction=0, **how))[0]


def compare_policies(settings: PolicyEvaluation, prompts: Examples, show: int = 0) -> Path:
    """Answer, score, judge and report.

    Args:
        prompts: of `read_prompts`, all or some.
        show: of how many prompts each policy's first answer is printed.

    Raises:
        UserError: something that is named cannot be used; told before anybody answers.
    """
    out = output_folder(settings.out)
    roster = read_roster(settings.runs, settings.against)
    distinct = list(prompts)
    examples = [example for example in distinct for _ in range(settings.samples)]
    backbone = Backbone(roster.base())
    renderer = Renderer(backbone.tokenizer, roster.data(settings.prompts, settings.max_new_tokens), backbone.context)
    roster.load(backbone)
    sources = load_sources(settings, backbone, renderer, distinct)
    judge = load_judge(settings.judge, settings.judge_model, renderer, distinct, sources)
    answers = {
        key: answer(policy, roster, backbone, renderer, examples, sources, settings)
        for key, policy in roster.answering.items()
    }
    write_answers(out, answer_rows(roster, examples, answers, {}, settings.samples))  # should the judge fail
    judged = judge_all(judge, roster, examples, answers)
    clusters = [e.prompt_key for e in examples]
    policies = [report_on(key, roster, answers, judged, clusters, settings) for key in answers]
    facts = {
        "base": backbone.info.model,
        "prompts": len(distinct),
        **{key: value for key, value in dataclasses.asdict(settings).items() if key not in ("runs", "prompts", "out")},
        "prompts_file": settings.prompts,
        "max_new_tokens": renderer.data.max_completion_tokens,
        "judge": judge.name if judge else None,
        "against": roster.against_name,
    }
    notes = [*roster.notes, *skip_notes(prompts), *text_notes(roster, renderer, distinct, answers)]
    report = Report(facts, policies, notes)
    write_answers(out, answer_rows(roster, examples, answers, judged, settings.samples))
    write_report(out, report)
    print_report(report)
    show_answers(roster, examples, answers, show, settings.samples)
    print(f"evaluate policy: report.md, report.json, answers.jsonl and plots in {out}", flush=True)
    return out


def output_folder(out: str | None) -> Path:
    folder = Path(out) if out else unused_run_dir("evaluation")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out: {folder} is not an empty folder; choose another")
    return folder


def load_sources(
    settings: PolicyEvaluation, backbone: Backbone, renderer: Renderer, prompts: SequenceOf[Example]
) -> dict[str, Reward]:
    """What scores every answer: `reward` and `gold`, where they are asked for."""
    terms: list[Weighted] = []
    if settings.reward_from:
        roles = load_members(backbone, settings.reward_from, "reward", key="--reward-from")
        reward = AdapterReward(backbone, roles, RewardSource(settings.reward_from), MICRO_BATCH)
        terms.append(Weighted("--reward-from", reward))
    functions: dict[str, Reward] = {}
    for flag, name in (("--reward", settings.reward), ("--gold", settings.gold)):
        if name:
            functions[flag] = load_function(flag, name, renderer, prompts)
    if "--reward" in functions:
        terms.append(Weighted("--reward", functions["--reward"]))
    sources: dict[str, Reward] = {"reward": WeightedSum(terms)} if terms else {}
    return sources | ({"gold": functions["--gold"]} if "--gold" in functions else {})


def answer(
    policy: Policy,
    roster: Roster,
    backbone: Backbone,
    renderer: Renderer,
    examples: SequenceOf[Example],
    sources: dict[str, Reward],
    settings: PolicyEvaluation,
) -> Answers:
    """One policy's answers and what there is to say of each."""
    reference = roster.policies[policy.reference].role if policy.reference else None
    sequences = sample_answers(
        policy.name,
        policy.role,
        backbone,
        renderer,
        examples,
        seed=settings.seed,
        temperature=settings.temperature,
        batch_size=settings.batch_size,
    )
    return measure_answers(
        policy.role, reference, backbone, renderer, examples, sequences, sources, temperature=settings.temperature
    )


def judge_all(
    judge: Judge | None, roster: Roster, examples: SequenceOf[Example], answers: dict[Key, Answers]
) -> dict[Key, Judged]:
    """Each policy against its opponent."""
    if judge is None:
        return {}
    opponents = {key: roster.opponent(policy) for key, policy in roster.answering.items()}
    return {key: judge(examples, answers[key], answers[opponent]) for key, opponent in opponents.items()}


def report_on(
    key: Key,
    roster: Roster,
    answers: dict[Key, Answers],
    judged: dict[Key, Judged],
    clusters: SequenceOf[str],
    settings: PolicyEvaluation,
) -> PolicyReport:
    policy = roster.policies[key]
    opponent = roster.opponent(policy)
    ours, theirs = answers[key], answers[opponent]
    metrics, differences = summarise(ours, theirs, clusters, settings.samples, settings.seed)
    wins, facts = summarise_wins(judged[key], ours, theirs, clusters, settings.seed) if key in judged else ({}, {})
    name = roster.policies[opponent].name
    return PolicyReport(policy.name, policy.run, name, metrics | wins, differences, facts)


def skip_notes(prompts: Examples) -> list[str]:
    """Rows of the prompts' file that are left out, and why the first of them is."""
    read = prompts.reading
    return [f"{read.skipped} of {read.rows} rows of prompts are left out: {read.reasons[0]}"] if read.skipped else []


def text_notes(
    roster: Roster, renderer: Renderer, prompts: SequenceOf[Example], answers: dict[Key, Answers]
) -> list[str]:
    """Prompts that the limit cut and answers that say nothing; the figures count both as they are."""
    cut = sum(renderer.prompt(e.prompt, e.where)[1] for e in prompts)
    limit = renderer.data.max_prompt_tokens
    notes = [f"{cut} of {len(prompts)} prompts are cut to the runs' data.max_prompt_tokens, {limit}"] if cut else []
    for key, a in answers.items():
        if empty := sum(not text.strip() for text in a.texts):
            notes.append(f"{roster.policies[key].name}: {empty} of {len(a.texts)} answers say nothing")
    return notes


def answer_rows(
    roster: Roster,
    examples: SequenceOf[Example],
    answers: dict[Key, Answers],
    judged: dict[Key, Judged],
    samples: int,
) -> list[dict[str, Any]]:
    """One row per policy, prompt and sample, for answers.jsonl."""
    rows = []
    for key, a in answers.items():
        for i, example in enumerate(examples):
            row = {
                "policy": roster.policies[key].name,
                "prompt": prompt_value(example),
                "sample": i % samples,
                "completion": a.texts[i],
                "tokens": a.lengths[i],
                "ended": a.ended[i],
                **{name: scores[i] for name, scores in a.scores.items()},
                "kl_to_base": a.kl_to_base[i],
                "kl_to_reference": a.kl_to_reference[i] if a.kl_to_reference else None,
            }
            if key in judged:
                row["preference"] = judged[key].preferences[i]
            rows.append(row)
    return rows


def write_answers(out: Path, rows: list[dict[str, Any]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_report(out: Path, report: Report) -> None:
    """Plots and pages; report.json comes last, so where it is, all are."""
    plot_report(report, out)
    write_atomic(out / "report.md", markdown(report))
    write_atomic(out / "report.json", json.dumps(as_json(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def show_answers(
    roster: Roster, examples: SequenceOf[Example], answers: dict[Key, Answers], show: int, samples: int
) -> None:
    """Print the first answer of each policy to some prompts, with its score."""
    for i in range(0, min(show * samples, len(examples)), samples):
        print(f"\n{examples[i].prompt[-1]['content']}")
        for key, a in answers.items():
            score = f"  {a.scores['reward'][i]:+.2f}" if "reward" in a.scores else ""
            print(f"  {roster.policies[key].name:>4}{score}  {a.texts[i]!r}")
