"""docs/preferences.md: its commands are read and its list of losses is whole."""

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from lowrank_rlhf.cli import main
from lowrank_rlhf.config_preference import DPOLoss

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/preferences.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^lowrank-rlhf (.+)$", PAGE, re.MULTILINE)


def test_there_is_a_command_of_each_stage():
    assert [command.split()[0] for command in COMMANDS] == ["dpo", "orpo", "kto"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_recipes(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main([*shlex.split(command), "--dry-run"]) == 0
    assert "policy_from" in capsys.readouterr().out


def test_every_loss_is_named():
    table = PAGE.split("## DPO")[1].split("`dpo.label_smoothing` is for")[0]
    assert set(get_args(DPOLoss)) <= set(re.findall(r"\w+", table))


def test_the_readme_names_the_page():
    assert "(docs/preferences.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
