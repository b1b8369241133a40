"""Any words arrive as they are and run nothing: in values, in the environment, in secrets and in the names of files."""

import json
import os
import random
import string

import pytest
import yaml

from lowrank_rlhf.config import SFTRecipe
from lowrank_rlhf.loader import as_dict, as_yaml, load_recipe
from lowrank_rlhf.remote import machine as there
from lowrank_rlhf.remote import pulling, ssh
from tests.loopback import HOST, laptop, needs_sshd, until

pytestmark = needs_sshd

MEAN = [
    *"'\"\n*?- \t\\\r~!#;<>()=:@,\x7f\x01é\u2028\x85\ufeff\u202e🙂", "👩‍🚀", "日本", "  ", "--", "-e", "\\n", "%s",
    "\x1b[31m", "$(touch {})", "`touch {}`", ";touch {};", "&touch {}&", "|touch {}|", "$HOME", "${{PATH}}", "[a]",
    "{{a,b}}",
]  # fmt: skip
TRAINING = """
def main(argv):
    kept = {name: os.environ[name] for name in os.environ if name.startswith("WORD_")}
    with open(".said", "w") as file:
        json.dump({"argv": argv, "env": kept}, file)
    os.rename(".said", "said")
    return 0
"""


def words(count, canary, unfit=""):
    """Random texts of what shells, YAML and rsync read; each command among them would make the file `canary`."""
    draw = random.Random(8)
    pieces = [piece.format(canary) for piece in MEAN]
    made = [piece for piece in pieces if not set(piece) & set(unfit)]
    while len(made) < count:
        parts = draw.choices([*pieces, *string.ascii_letters[:6]], k=draw.randint(2, 7))
        word = "".join(parts)
        if not set(word) & set(unfit):
            made.append(word)
    return list(dict.fromkeys(made))


@pytest.fixture(scope="module")
def machine(machine):
    machine.pretend(TRAINING)
    return machine


@pytest.fixture
def host(machine, monkeypatch):
    monkeypatch.setenv("PATH", machine.env["PATH"])
    return ssh.Host(HOST, str(machine.there))


def no_canary(*folders):
    homes = [os.path.expanduser("~"), "/", *folders]
    return not any(os.path.exists(os.path.join(folder, "canary")) for folder in homes)


def test_words_of_a_command_its_environment_and_its_secrets(machine, host):
    there.push_code(host)
    given = words(200, "canary")
    plain = {f"WORD_{number}": word for number, word in enumerate(given)}
    hidden = {f"WORD_S{number}": word for number, word in enumerate(given)}
    place = host.ask("reserve", stage="sft", run_dir=None)
    about = {"stage": "sft", "run_dir": place["run_dir"], "needs": [], "overwrite": False, "launcher": []}
    about |= {"env": plain, "command": ["sft", *given], "resume_command": ["sft"]}
    host.ask("start", name=place["job"], about=about, files={"recipe.yaml": as_yaml({"a": given})}, secrets=hidden)
    said = machine.there / "work" / "said"
    until(said.exists)
    assert json.loads(said.read_text()) == {"argv": ["sft", *given], "env": plain | hidden}
    job = machine.there / "jobs" / place["job"]
    assert json.loads((job / "job.json").read_text())["command"] == ["sft", *given]
    assert yaml.safe_load((job / "recipe.yaml").read_text()) == {"a": given}
    assert no_canary(machine.there, machine.there / "work", job)


def test_names_of_files_on_the_way_there(machine, host, tmp_path, monkeypatch):
    """Each a file of its own, a folder of that name, and a path that begins with it."""
    monkeypatch.chdir(tmp_path)
    given = [word for word in words(120, "canary", unfit="/") if word.strip(".")]
    for number, name in enumerate(given):
        (tmp_path / f"{name}.d").mkdir()
        (tmp_path / f"{name}.d" / name).write_text(str(number))
        (tmp_path / name).write_text(f"{number}!") if not (tmp_path / name).exists() else None
    before = set(os.listdir())
    listed = [place for name in given for place in (name, f"{name}.d/{name}")]
    host.copy_to(f"{os.getcwd()}/", "work/inputs/", "--copy-links", names=listed)
    work = machine.there / "work" / "inputs"
    for number, name in enumerate(given):
        assert (work / f"{name}.d" / name).read_text() == str(number)
        assert (work / name).read_text() == f"{number}!"
    assert set(os.listdir()) == before
    assert no_canary(machine.there, work, tmp_path)


RUN_DIRS = ["-x 'a' \"b\" $(touch canary)", "`touch canary`;touch canary\n*\\🙂&", "x:y #é\x7f", "~"]


def test_names_of_run_directories_on_the_way_back(machine, host, tmp_path, monkeypatch):
    """Started, and pulled into the same name here."""
    monkeypatch.chdir(tmp_path)
    there.push_code(host)
    for name in RUN_DIRS:
        place = host.ask("reserve", stage="sft", run_dir=name)
        about = {"stage": "sft", "run_dir": name, "needs": [], "overwrite": False, "launcher": [], "env": {}}
        about |= {"command": ["sft"], "resume_command": ["sft"]}
        host.ask("start", name=place["job"], about=about, files={"recipe.yaml": ""}, secrets={})
        run = machine.there / "work" / name
        (run / "adapters" / name).mkdir(parents=True)
        (run / "adapters" / name / name).write_text(name)
        pulling.pull(host, place["job"], None, checkpoints=False)
        assert (tmp_path / name / "adapters" / name / name).read_text() == name
    assert sorted(os.listdir()) == sorted(RUN_DIRS)
    assert no_canary(machine.there, machine.there / "work", tmp_path)


@pytest.mark.slow
def test_a_real_run_whose_names_and_values_are_of_the_worst(machine, tmp_path):
    """The recipe that trains there is the one of here, word for word."""
    machine.ready(tmp_path)
    here = tmp_path / "a 'b' \"c\" $(touch canary)\n🙂"
    laptop(here)
    data = "d `touch canary`;&|*\\ é\t'\".jsonl"
    (here / "data.jsonl").rename(here / data)
    run_dir = "runs/r '\" $(touch canary) 🙂"
    template = "Q: {prompt}\n$(touch canary) `touch canary` 'x' \"y\" \\ 🙂\t: "
    given = {"data.train": data, "run_dir": run_dir, "data.prompt_template": template, "lora.r": 2}
    overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items()]
    said = machine.run("run", "sft.yaml", "--tiny", "--follow", *overrides, cwd=here)
    assert "finished" in said.stdout
    ours = as_dict(load_recipe(SFTRecipe, here / "sft.yaml", overrides, tiny=True))
    assert json.loads((machine.there / "work" / run_dir / "run.json").read_text())["recipe"] == ours
    machine.run("pull", cwd=here)
    assert (here / run_dir / "adapters/sft/adapter_model.safetensors").is_file()
    assert no_canary(machine.there, machine.there / "work", here, tmp_path)
