"""docs/rewards.md: its recipes are read, its function and its server are run."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowrank_rlhf.backbone.tiny import tiny_tokenizer
from lowrank_rlhf.config import Data, PPORecipe, RewardSource
from lowrank_rlhf.data import Example, Renderer, Sequence, load_prompts
from lowrank_rlhf.loader import load_recipe
from lowrank_rlhf.rewards import VERIFIERS, reward_function

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
YAML, PYTHON = (
    re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE) for language in ("yaml", "python")
)
RENDERER = Renderer(tiny_tokenizer(), Data(train="unused"))
DATA = os.environ.get("LOWRANK_RLHF_DATA")


def read(snippet, path, *overrides):
    path.write_text(snippet, encoding="utf-8")
    return load_recipe(PPORecipe, path, overrides or (() if "train:" in snippet else ("data.train=d.jsonl",)))


def score(name, *texts):
    examples = [Example("", [{"role": "user", "content": "Hi"}]) for _ in texts]
    ids = [Sequence([1], RENDERER.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return reward_function(name, RENDERER)(examples, ids).scores


def test_the_page_is_short_and_the_readme_leads_to_it():
    assert PAGE.count("\n") <= 120
    assert "(docs/rewards.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_recipe_on_it_is_read_and_shows_every_kind_of_reward(tmp_path):
    recipes = [read(snippet, tmp_path / f"{i}.yaml") for i, snippet in enumerate(YAML)]
    named = [recipe.reward for recipe in recipes]
    assert named == [None, "exact_number", "http://localhost:8000/score", None]
    assert recipes[0].reward_from == [
        RewardSource("runs/helpful", 1.0, "mean_minus_std", 0.5),
        RewardSource("runs/verbose", -0.5),
    ]
    assert recipes[-1].shaping.scale
    assert recipes[-1].kl.target == 6.0


def test_its_table_has_every_verifier():
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == [
        "exact_number",
        "exact_match",
        "pattern",
        "math_verify",
        "reasoning_gym",
    ]
    assert len(VERIFIERS) == 5


def test_its_function_scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    (tmp_path / "my_rewards.py").write_text(PYTHON[0], encoding="utf-8")
    assert score("my_rewards:polite", "Please sit.", "Sit!") == [1.0, 0.0]


@pytest.mark.usefixtures("local_servers")
def test_its_server_scores(tmp_path):
    """As it stands, but for the port."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    (tmp_path / "server.py").write_text(PYTHON[1].replace("8000", str(port)), encoding="utf-8")
    with subprocess.Popen([sys.executable, tmp_path / "server.py"], stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(port)
            assert score(f"http://localhost:{port}/score", "few words", "word " * 41) == [1.0, 0.0]
        finally:
            server.kill()


def wait_for(port):
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("localhost", port)).close()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)


@pytest.mark.skipif(DATA is None, reason="LOWRANK_RLHF_DATA does not name the folder of the real data")
def test_its_recipe_for_gsm8k_fits_the_real_file(tmp_path):
    (snippet,) = (text for text in YAML if "gsm8k" in text)
    recipe = read(snippet, tmp_path / "recipe.yaml", f"data.train={DATA}/gsm8k_train.jsonl.gz")
    prompts, _ = load_prompts(recipe.data)
    assert len(prompts) > 1000
    reward_function(recipe.reward, RENDERER).check(prompts)
