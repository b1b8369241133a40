"""Who is found in a folder of runs, what is left out and with which words, and that no link leads out of it."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from chat_runs import TINY, edit, write_run

from lowrank_rlhf.arena.chat.catalog import Limits, find
from lowrank_rlhf.config import Base, Lora


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """sft, a ppo with two adapters and two checkpoints, and a reward run; tests change copies."""
    folder = tmp_path_factory.mktemp("made")
    write_run(folder / "sft")
    write_run(folder / "ppo", "ppo", roles=("policy", "sft"), steps=(5, 20))
    write_run(folder / "reward", "reward")
    return folder


@pytest.fixture
def runs(made, tmp_path):
    shutil.copytree(made, tmp_path / "runs")
    for age, name in enumerate(("ppo", "sft", "reward")):
        os.utime(tmp_path / "runs" / name / "run.json", (1e9 - age, 1e9 - age))
    return tmp_path / "runs"


def problems(catalog):
    return {problem.path.name: problem.reason for problem in catalog.problems}


def test_every_adapter_and_checkpoint_is_a_speaker_of_the_base(runs):
    catalog = find(runs)
    assert list(catalog.speakers) == ["base", "ppo", "ppo sft", "ppo step 20", "ppo step 5", "sft"]
    assert catalog.problems == []
    assert catalog.rewards == {"reward": runs / "reward"}
    assert catalog.base == dataclasses.replace(TINY, device="auto")
    assert catalog.limits == Limits(max_prompt_tokens=64, max_completion_tokens=32)
    late = catalog.speakers["ppo step 20"]
    assert late.weights == runs / "ppo/checkpoints/step-000020/state.pt"
    assert (late.role, late.lora.r, late.lora.alpha) == ("policy", 4, 32)
    assert (late.speaker.run, late.speaker.role, late.speaker.step) == ("ppo", "policy", 20)
    assert late.speaker.base == "tiny"
    assert late.speaker.revision == "seed-0"
    assert catalog.speakers["base"].speaker.revision == "seed-0"


def test_the_runs_of_a_pipeline_keep_their_folder_in_the_name(runs):
    (runs.parent / "all").mkdir()
    runs.rename(runs.parent / "all" / "pipeline")
    write_run(runs.parent / "all" / "sft", seed=1)
    catalog = find(runs.parent / "all")
    assert {"sft", "pipeline/sft", "pipeline/ppo step 5"} <= set(catalog.speakers)
    assert list(catalog.rewards) == ["pipeline/reward"]
    assert catalog.speakers["pipeline/sft"].speaker.run == "pipeline/sft"


def test_a_scan_imports_nothing_heavy(runs):
    script = (
        "import sys; from pathlib import Path; from lowrank_rlhf.arena.chat.catalog import find;"
        f"print(len(find(Path({str(runs)!r})).speakers));"
        "assert not {'torch', 'transformers', 'peft', 'gradio'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "6"


def test_no_runs_yet_is_the_base_alone_and_a_new_run_appears_with_the_next_scan(tmp_path):
    catalog = find(tmp_path / "runs")
    assert list(catalog.speakers) == ["base"]
    assert (catalog.base, catalog.rewards, catalog.problems) == (Base(), {}, [])
    write_run(tmp_path / "runs" / "first")
    assert list(find(tmp_path / "runs").speakers) == ["base", "first"]


def test_the_folder_may_be_one_run(runs):
    assert list(find(runs / "sft").speakers) == ["base", "sft"]


def garble(name):
    def change(folder):
        (folder / name).write_bytes(b"\x00{not json")

    return change


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut_short(folder):
    path = folder / "adapters/sft/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def set_config(**values):
    def change(folder):
        path = folder / "adapters/sft/adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def edit_base(**values):
    return lambda folder: edit(folder, lambda info: info["base"].update(values))


def whole(text):
    return lambda folder: (folder / "run.json").write_text(text)


BROKEN = {
    "no run.json": (remove("run.json"), "has no run.json"),
    "garbled run.json": (garble("run.json"), "run.json cannot be read"),
    "a list": (whole("[1]"), "not an object"),
    "not begun": (lambda f: edit(f, lambda info: info.pop("base")), "has not begun to train"),
    "another version": (lambda f: edit(f, lambda info: info["recipe"].pop("data")), "not of this version: KeyError"),
    "recipe is text": (lambda f: edit(f, lambda info: info.update(recipe="x")), "not of this version"),
    "a number for a model": (edit_base(model=3), "what identifies its base is no text"),
    "no weights": (remove("adapters/sft/adapter_model.safetensors"), "has no adapter_model.safetensors"),
    "weights cut short": (cut_short, "damaged or was not copied whole"),
    "weights are text": (garble("adapters/sft/adapter_model.safetensors"), "damaged or was not copied whole"),
    "no config": (remove("adapters/sft/adapter_config.json"), "has no adapter_config.json"),
    "garbled config": (garble("adapters/sft/adapter_config.json"), "adapter_config.json cannot be read"),
    "another kind": (set_config(peft_type="LOHA"), "adapter type LOHA is not supported"),
    "DoRA": (set_config(use_dora=True), "uses DoRA"),
    "rank is text": (set_config(r="many"), "is not of a LoRA"),
    "another base": (edit_base(model="other-1b"), r"another base model \('other-1b', here 'tiny'\).* --base other-1b"),
    "another quantisation": (edit_base(quantization="nf4"), "another quantisation"),
    "another revision": (edit_base(revision="seed-1"), "another revision"),
    "another template": (edit_base(template_hash="0"), "another chat template"),
    "still training": (
        lambda f: (shutil.rmtree(f / "adapters"), edit(f, lambda info: info.pop("final"))),
        "has no adapter yet: it is still training",
    ),
    "nothing in it": (lambda f: shutil.rmtree(f / "adapters"), "holds no adapter that answers or scores"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_run_is_a_problem_in_words_and_the_others_are_found(runs, case):
    change, reason = BROKEN[case]
    change(runs / "sft")
    catalog = find(runs)
    assert list(catalog.speakers) == ["base", "ppo", "ppo sft", "ppo step 20", "ppo step 5"]
    ((name, told),) = problems(catalog).items()
    assert name == "sft"
    assert re.search(reason, told)


def test_the_base_of_most_runs_is_chosen_unless_one_is_given(runs):
    edit(runs / "ppo", lambda info: info["base"].update(model="other-1b"))
    edit(runs / "ppo", lambda info: info["recipe"]["base"].update(model="other-1b"))
    assert find(runs).base.model == "tiny"
    given = find(runs, base=Base(model="other-1b", quantization="none"))
    assert "ppo step 5" in given.speakers
    assert sorted(problems(given)) == ["reward", "sft"]
    neither = find(runs, base=Base(model="third"))
    assert list(neither.speakers) == ["base"]
    assert len(neither.problems) == 3


def test_prompt_templates_matter_only_where_there_is_no_chat_template(runs):
    def other(info):
        info["recipe"]["data"]["prompt_template"] = "Q: {prompt}"

    edit(runs / "sft", other)
    assert "sft" in find(runs).speakers
    none = "74234e98afe7498f"  # the first 16 digits of sha256("null")
    for name in ("sft", "ppo", "reward"):
        edit(runs / name, lambda info: info["base"].update(template_hash=none))
    catalog = find(runs)
    assert list(problems(catalog)) == ["sft"]
    assert "another data.prompt_template" in problems(catalog)["sft"]
    assert catalog.prompt_template == "Instruction: {prompt}\nResponse: "


def test_a_base_that_is_loaded_stays_whatever_most_runs_are_of(runs):
    before = find(runs)
    for name in ("ppo", "reward"):
        edit(runs / name, lambda info: info["base"].update(template_hash="0"))
    assert list(find(runs).rewards) == ["reward"]
    after = find(runs, pinned=before)
    assert list(after.speakers) == ["base", "sft"]
    assert (after.base, after.identity[:4]) == (before.base, before.identity[:4])
    assert {name: "another chat template" in reason for name, reason in problems(after).items()} == {
        "ppo": True,
        "reward": True,
    }
    shutil.rmtree(runs)
    assert find(runs, pinned=before).base == before.base


def test_the_prompt_template_is_the_one_of_the_base_also_where_no_run_can_be_used(runs):
    for name in ("ppo", "reward"):
        shutil.rmtree(runs / name)
    edit(runs / "sft", lambda info: info["base"].update(template_hash="74234e98afe7498f"))
    edit(runs / "sft", lambda info: info["recipe"]["data"].update(prompt_template="Q: {prompt}"))
    assert find(runs).prompt_template == "Q: {prompt}"
    shutil.rmtree(runs / "sft/adapters")
    assert find(runs).prompt_template == "Q: {prompt}"


# Links and names


def test_links_and_dots_never_lead_out_of_the_folder(runs, tmp_path):
    secret = write_run(tmp_path / "elsewhere" / "secret", seed=3)
    (runs / "link").symlink_to(secret)
    (runs / "dots").symlink_to("../elsewhere/secret")
    (runs / "group").symlink_to(tmp_path / "elsewhere")
    (runs / "loop").symlink_to(runs / "loop")
    weights = runs / "sft/adapters/sft/adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(secret / "adapters/sft/adapter_model.safetensors")
    state = runs / "ppo/checkpoints/step-000005/state.pt"
    state.unlink()
    state.symlink_to(secret / "adapters/sft/adapter_model.safetensors")
    catalog = find(runs)
    assert list(catalog.speakers) == ["base", "ppo", "ppo sft", "ppo step 20"]
    told = problems(catalog)
    assert "leads out of" in told["link"]
    assert "leads out of" in told["dots"]
    assert "leads out of" in told["group"]
    assert "leads out of" in told["sft"]
    assert "not a checkpoint" in told["step-000005"]


def test_a_link_inside_the_folder_is_followed(runs):
    (runs / "best").symlink_to("sft")
    assert {"sft", "best"} <= set(find(runs).speakers)


def test_a_run_that_is_called_base_does_not_replace_the_base(runs):
    (runs / "sft").rename(runs / "base")
    catalog = find(runs)
    assert catalog.speakers["base"].weights is None
    assert catalog.speakers["base (run)"].speaker.run == "base"


# Checkpoints of a run that is still training


def unfinished(run, **recipe):
    shutil.rmtree(run / "adapters")
    edit(run, lambda info: (info.pop("final"), info["recipe"].update(recipe)))


def test_checkpoints_of_a_running_training_take_the_options_of_its_recipe(runs):
    unfinished(runs / "ppo", lora=dataclasses.asdict(Lora(r=4, alpha=7)))
    catalog = find(runs)
    assert catalog.problems == []
    assert catalog.speakers["ppo step 5"].lora.alpha == 7


def test_where_the_policy_started_from_a_run_it_has_that_runs_options(runs):
    shutil.rmtree(runs / "sft")
    write_run(runs / "sft", lora=Lora(r=4, alpha=9))
    for start in (str(runs / "sft"), "somewhere/else/sft"):  # the second: the folder of runs was copied here
        if (runs / "ppo/adapters").exists():
            unfinished(runs / "ppo")
        edit(runs / "ppo", lambda info, start=start: info["recipe"].update(policy_from=start))
        assert find(runs).speakers["ppo step 5"].lora.alpha == 9
    edit(runs / "ppo", lambda info: info["recipe"].update(policy_from="gone"))
    catalog = find(runs)
    assert "ppo step 5" not in catalog.speakers
    assert "started from gone" in problems(catalog)["checkpoints"]


def test_checkpoints_of_trls_trainers_are_found_too(runs):
    folder = runs / "ppo/checkpoints/step-000020"
    (folder / "state.pt").rename(folder / "roles.pt")
    edit(runs / "ppo", lambda info: info.update(stage="kto"))
    assert find(runs).speakers["ppo step 20"].weights == folder / "roles.pt"
    edit(runs / "ppo", lambda info: info.update(stage="reward"))  # whose checkpoints answer nothing
    assert "ppo step 5" not in find(runs).speakers


# Adapters from elsewhere


def test_adapters_from_elsewhere_are_a_peft_folder_or_a_run(runs, tmp_path):
    other = write_run(tmp_path / "elsewhere", "dpo", seed=4)
    catalog = find(runs, {"mine": other, "plain": other / "adapters/policy", "sft": other, "none": tmp_path / "no"})
    mine, plain = catalog.speakers["mine"], catalog.speakers["plain"]
    assert mine.weights == plain.weights == other / "adapters/policy/adapter_model.safetensors"
    assert (plain.speaker.run, plain.speaker.role) == ("plain", "adapter")
    assert [p.path for p in catalog.problems] == [other, tmp_path / "no"]
    assert "'sft' is taken" in catalog.problems[0].reason
    assert "has no adapter_config.json" in catalog.problems[1].reason
    edit(other, lambda info: info["base"].update(template_hash="x"))
    assert "another chat template" in problems(find(runs, {"mine": other}))["elsewhere"]
