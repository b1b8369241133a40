"""The machine check: what it prints where all is well, and every failure with its fix."""

import dataclasses
import logging
import math
import shutil
from collections import namedtuple
from importlib import metadata

import pytest
import torch

from lowrank_rlhf import cli, doctor
from lowrank_rlhf.backbone import base, embedded, selftest
from lowrank_rlhf.backbone.selftest import TOLERANCE, SelfTest, four_bit_self_test, has_avx512bf16

GOOD = SelfTest("cpu", 0.003, 0.003, 0.003, 0.003, 0.003)
NAMES = [
    *("python", "torch", "transformers", "peft", "bitsandbytes", "trl", "device", "memory free", "bf16"),
    *("disk, cache", "disk, here", "embedded model", "4-bit self-test"),
]


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """An empty cache folder, and the log level of bitsandbytes put back."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    yield
    logger.setLevel(level)


def report(capsys):
    """Exit status, and {check name: (status, finding and fix)}, and the final sentence."""
    status = doctor.main()
    text, _, final = capsys.readouterr().out.rstrip().rpartition("\n\n")
    lines = {}
    for line in text.replace("\n      fix: ", " | fix: ").splitlines():
        lines[line[6:24].strip()] = (line[:4].strip(), line[26:])
    return status, lines, final


def test_here_everything_is_in_order(capsys):
    status, lines, final = report(capsys)
    assert list(lines) == NAMES
    assert {name: word for name, (word, _) in lines.items() if word == "FAIL"} == {}
    assert status == 0
    assert final.startswith("Training works on this machine.")
    assert lines["torch"][1].startswith(torch.__version__)


def test_the_command_line_has_it(capsys):
    assert cli.main(["doctor"]) == 0
    assert "4-bit self-test" in capsys.readouterr().out


# Each failure, its line, its fix, and exit status 1


def fails(capsys, name, finding, fix):
    status, lines, final = report(capsys)
    word, text = lines[name]
    assert (status, word) == (1, "FAIL")
    assert finding in text
    assert "| fix: " in text
    assert fix in text.partition("| fix: ")[2]
    failed = sum(word == "FAIL" for word, _ in lines.values())
    assert final == (
        f"{failed} of {len(lines)} checks failed: training here would be wrong or impossible; see each fix."
    )
    return lines


def test_a_package_out_of_range(capsys, monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=1,<2", "trl>=1"])
    lines = fails(capsys, "torch", f"{torch.__version__}, needed is <2,>=1", "pip install 'torch<2,>=1'")
    assert lines["trl"][0] == "ok"


def test_a_package_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ["no-such-package>=1"])
    fails(capsys, "no-such-package", "not installed", "pip install 'no-such-package>=1'")


def test_packages_of_extras_are_not_needed(capsys, monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ['no-such-package; extra == "track"'])
    status, lines, _ = report(capsys)
    assert status == 0
    assert "no-such-package" not in lines


def test_a_python_that_is_too_old(capsys, monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.2")
    fails(capsys, "python", "3.10.2, needed is >=3.11", "use a Python >=3.11")


@pytest.mark.parametrize(("name", "fix"), [("disk, cache", "set HF_HOME"), ("disk, here", "set run_dir")])
def test_a_full_disk(capsys, monkeypatch, tmp_path, name, fix):
    """One byte below 1 GiB, on the one disk; the other has room."""
    full = tmp_path if name == "disk, cache" else doctor.Path.cwd()
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30 - (path == full)))
    lines = fails(capsys, name, "GiB free in", fix)
    assert sum(word == "FAIL" for word, _ in lines.values()) == 1


def test_a_folder_that_cannot_be_written(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: path != tmp_path)
    fails(capsys, "disk, cache", f"{tmp_path} cannot be written to", "set HF_HOME")


def test_a_wrong_self_test(capsys, monkeypatch):
    wrong = dataclasses.replace(GOOD, gradient_after=1.0)
    monkeypatch.setattr(selftest, "four_bit_self_test", lambda: wrong)
    fails(capsys, "4-bit self-test", "gradient_after 100.00%", "base.quantization=none")


@pytest.mark.parametrize("error", [RuntimeError("no native library"), OSError("libcudart"), ImportError("torch")])
def test_a_check_that_cannot_run_is_a_failure_and_the_others_still_run(capsys, monkeypatch, error):
    def broken():
        raise error

    monkeypatch.setattr(selftest, "four_bit_self_test", broken)
    lines = fails(capsys, "self test", f"could not run: {type(error).__name__}: {error}", "pip install")
    assert list(lines)[:-1] == NAMES[:-1]


# What is only information


def test_the_embedded_model_not_fetched_damaged_and_intact(capsys, tmp_path):
    assert report(capsys)[1]["embedded model"][1].startswith("not fetched yet")
    folder = embedded.cache_dir() / embedded.MODEL_ID
    folder.mkdir(parents=True)
    status, lines, final = report(capsys)
    assert lines["embedded model"] == ("warn", "damaged (no readable manifest.json); its next use builds it again")
    assert (status, final) == (0, "Training works on this machine. Mind the warnings.")
    (folder / "manifest.json").write_text("{}")
    assert report(capsys)[1]["embedded model"][0] == "ok"


@pytest.mark.parametrize(
    ("dtype", "word", "finding"),
    [(torch.float16, "warn", "float16 instead"), (torch.bfloat16, "ok", "native"), (torch.float32, "ok", "float32")],
)
def test_bf16_and_what_takes_its_place(capsys, monkeypatch, dtype, word, finding):
    monkeypatch.setattr(base, "pick_dtype", lambda device: dtype)
    status, lines, _ = report(capsys)
    assert lines["bf16"][0] == word
    assert finding in lines["bf16"][1]
    assert status == 0


# The self-test itself


def test_four_bit_training_is_right_here():
    result = four_bit_self_test("cpu")
    assert result.ok, result
    assert len(result.errors) == 5
    assert all(0 < error < TOLERANCE / 2 for error in result.errors.values())  # 0 would mean that nothing was compared


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks 4-bit weights only on a CPU with AVX512-BF16")
@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered:UserWarning")
def test_without_the_fix_training_after_generating_is_wrong_and_the_self_test_says_so():
    """Trap 1: after one eval forward the matmul has no autograd; no gradient arrives, so it is off by all of itself."""
    result = four_bit_self_test("cpu", keep_autograd=False)
    assert not result.ok
    assert result.gradient_after == 1.0
    assert all(error <= TOLERANCE for name, error in result.errors.items() if name != "gradient_after")


@pytest.mark.parametrize("name", list(GOOD.errors))
@pytest.mark.parametrize("error", [1.01 * TOLERANCE, math.nan, math.inf])
def test_any_error_above_the_tolerance_fails(name, error):
    assert GOOD.ok
    assert not dataclasses.replace(GOOD, **{name: error}).ok


def test_the_self_test_uses_up_no_random_numbers():
    before = torch.get_rng_state()
    four_bit_self_test("cpu")
    assert torch.equal(before, torch.get_rng_state())


def test_the_self_test_notices_wrong_weights(monkeypatch):
    """Dequantised 5 % too large, all that is computed from the packed weights is off by 1 − 1/1.05 = 4.8 %."""
    right = selftest.bnb.functional.dequantize_4bit
    monkeypatch.setattr(selftest.bnb.functional, "dequantize_4bit", lambda *args: 1.05 * right(*args))
    result = four_bit_self_test("cpu")
    assert not result.ok
    assert result.forward == pytest.approx(0.048, abs=0.002)


def test_a_card_that_torch_does_not_see(capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("torch sees a card here")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    fails(capsys, "device", "although nvidia-smi is here", "update the NVIDIA driver")
