"""What goes wrong on the way to another machine is told in words, by real ssh and rsync against a real sshd."""

import argparse
import errno
import io
import os
import shutil
import sys

import pytest

from lowrank_rlhf import cli
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.remote import ssh
from lowrank_rlhf.remote.failures import Lost, explain
from lowrank_rlhf.remote.machine import push_code, up
from lowrank_rlhf.remote.running import Start, start
from lowrank_rlhf.remote.shipment import Shipment
from lowrank_rlhf.remote.there import agent, jobs
from lowrank_rlhf.remote.verb import add_remote_arguments, remote
from tests.loopback import HOST, free_port, needs_sshd


@pytest.fixture(scope="module")
def machine(new_machine):
    return new_machine  # nothing is installed on it


@pytest.fixture
def host(machine, monkeypatch):
    monkeypatch.setenv("PATH", machine.env["PATH"])
    monkeypatch.setattr(ssh, "WAITS", (0.05, 0.05))
    machine.configure()
    return ssh.Host(HOST, str(machine.there))


@needs_sshd
def test_a_key_that_is_refused(machine, host, tmp_path):
    os.system(f"ssh-keygen -q -t ed25519 -N '' -f {tmp_path}/other")
    machine.configure(IdentityFile=f"{tmp_path}/other")
    with pytest.raises(UserError, match="loop: it refused the key: does `ssh loop` work"):
        host.ask("look")


@needs_sshd
def test_a_machine_that_was_never_confirmed_and_one_that_has_changed(machine, host, tmp_path):
    machine.configure(UserKnownHostsFile=f"{tmp_path}/nothing", BatchMode="yes")
    with pytest.raises(UserError, match="its key is not known yet: connect once with `ssh loop`"):
        host.ask("look")
    key = (machine.folder / "user_key.pub").read_text()
    (tmp_path / "nothing").write_text(f"[127.0.0.1]:{machine.port} {key}")
    with pytest.raises(UserError, match="its key is not the one that is known"):
        host.ask("look")


@needs_sshd
def test_a_name_that_nobody_knows(host, machine, capfd):
    with pytest.raises(UserError, match=r"no such host|its name is not found"):
        ssh.Host("no-such-host.invalid", "x").ask("look")


@needs_sshd
def test_nobody_listens_there_is_tried_again_and_then_told(machine, host, capsys):
    machine.configure(Port=str(free_port()))
    with pytest.raises(UserError, match="Connection refused; what runs there goes on"):
        host.ask("look")
    assert capsys.readouterr().err.count("trying again in 0.05 s") == 2
    with pytest.raises(UserError, match="Connection refused; what was copied is kept, ask again"):
        push_code(host)


@needs_sshd
def test_a_machine_that_comes_back_is_reached_by_the_next_try(machine, host, monkeypatch):
    machine.kill()
    monkeypatch.setattr(ssh, "waited", lambda error, seconds: machine.start())
    assert host.ask("look")["rsync"]


def without(machine, tmp_path, *missing, **instead):
    """The PATH of a machine that lacks these programs."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("sh", "bash", "rsync", "python3"):
        if name not in missing:
            (folder / name).symlink_to(sys.executable if name == "python3" else shutil.which(name))
    for name, text in instead.items():
        (folder / name).unlink()
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    text = (machine.folder / "sshd_config").read_text()
    machine.kill()
    forced = f'ForceCommand PATH={folder}; export PATH; eval "$SSH_ORIGINAL_COMMAND"'
    (machine.folder / "sshd_config").write_text(f"{text}{forced}\n")
    machine.start()
    return text


@needs_sshd
@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("rsync", "it has no rsync: install it there"),
        ("python3", "it has no python3: install Python 3.11 or newer there"),
    ],
)
def test_a_program_is_missing_there(machine, host, tmp_path, missing, said):
    before = without(machine, tmp_path, missing)
    try:
        with pytest.raises(UserError, match=said):
            up(host, None, {})
        if missing == "rsync":
            with pytest.raises(UserError, match=said):
                push_code(host)
    finally:
        machine.kill()
        (machine.folder / "sshd_config").write_text(before)
        machine.start()


@needs_sshd
@pytest.mark.parametrize(
    ("version", "said"),
    [((3, 6, 9), "its python3 is 3.6.9, too old"), ((3, 9, 2), "its Python is 3.9.2, too old; 3.11")],
)
def test_a_python_that_is_too_old(machine, host, tmp_path, version, said):
    words = ".".join(map(str, version))
    code = f"import sys; sys.version_info = {version}; sys.version = '{words} (old)'; exec(sys.argv[1])"
    before = without(machine, tmp_path, python3=f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$2"\n')
    try:
        with pytest.raises(UserError, match=said):
            up(host, None, {})
    finally:
        machine.kill()
        (machine.folder / "sshd_config").write_text(before)
        machine.start()


@needs_sshd
def test_nothing_is_installed_and_then_something_else(machine, host, tmp_path):
    done = machine.run("ui", cwd=tmp_path, check=False)
    assert f"nothing is installed there yet; run: lowrank-rlhf remote up {HOST}" in done.stderr
    machine.ready(tmp_path)
    (machine.there / "setup.json").write_text('{"fingerprint": "of another version"}')
    (tmp_path / "sft.yaml").write_text("data: {train: org/data}\n")
    done = machine.run("run", "sft.yaml", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "it was set up for other versions of the packages" in done.stderr


@needs_sshd
def test_a_shell_that_greets_does_not_confuse_the_answer(machine, host, tmp_path, monkeypatch):
    (tmp_path / "ssh").write_text(f'#!/bin/sh\necho "Welcome to the cloud"\nexec {machine.bin}/ssh "$@"\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert host.ask("look")["rsync"]
    with pytest.raises(UserError, match="its shell says something by itself"):
        push_code(host)


def test_a_full_disk_there_is_told(monkeypatch, capsys, tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(agent.REQUESTS, "reserve", full)
    agent.answer({"do": "reserve", "dir": str(tmp_path), "with": {"stage": "sft", "run_dir": None}})
    assert '"refused": "its disk is full; make room there, then ask again"' in capsys.readouterr().out
    said = (
        'rsync: [receiver] write failed on "/x/data.jsonl": No space left on device (28)\nrsync error: error in file IO'
    )
    assert "its disk is full" in str(explain("gpu", 11, said))


@pytest.mark.parametrize(
    ("status", "said", "kind"),
    [
        (255, "ssh: connect to host gpu port 22: Connection timed out", Lost),
        (255, "kex_exchange_identification: read: Connection reset by peer", Lost),
        (255, "client_loop: send disconnect: Broken pipe", Lost),
        (255, "Timeout, server gpu not responding.", Lost),
        (12, "rsync: connection unexpectedly closed (0 bytes received so far) [sender]", Lost),
        (255, "ssh: Could not resolve hostname gpu: Temporary failure in name resolution", Lost),
        (255, "ssh: Could not resolve hostname gpu: Name or service not known", UserError),
        (255, "me@gpu: Permission denied (publickey).", UserError),
        (1, "Traceback (most recent call last):\nKeyError: 'x'", UserError),
        (23, "rsync: link_stat failed", UserError),
    ],
)
def test_only_what_another_try_can_mend_is_tried_again(status, said, kind):
    assert type(explain("gpu", status, said)) is kind


def test_a_name_that_was_found_before_is_a_network_that_is_down():
    said = "ssh: Could not resolve hostname gpu: nodename nor servname provided, or not known"
    assert type(explain("gpu", 255, said, reached=True)) is Lost


@pytest.mark.parametrize("name", ["", "-oProxyCommand=touch x", "a b", "a\nb"])
def test_what_is_no_host(name):
    with pytest.raises(UserError, match="HOST: "):
        ssh.Host(name, "x")


@pytest.mark.parametrize("folder", ["", "-x", "a b", "$(touch x)", "a;b", "`x`", "a'b"])
def test_what_is_no_folder(folder):
    with pytest.raises(UserError, match="--dir: "):
        ssh.Host("gpu", folder)


def test_no_ssh_and_no_rsync_here(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    host = ssh.Host("gpu", "x")
    with pytest.raises(UserError, match="ssh: not found here"):
        host.ask("look")
    with pytest.raises(UserError, match="rsync: not found here"):
        host.copy_to("x", "y")


def test_an_answer_without_a_mark_is_none():
    assert not ssh._skip_greeting(io.BytesIO(b"Welcome\n"))
    stream = io.BytesIO(b"Welcome\n" + ssh.MARK + b"{}\n")
    assert ssh._skip_greeting(stream)
    assert stream.read() == b"{}\n"


def test_two_ask_for_a_name_and_get_two(tmp_path):
    from lowrank_rlhf.remote.there.folders import Folders

    folders = Folders(str(tmp_path))
    assert [jobs.reserve(folders, "sft", None)["job"] for _ in range(3)] == ["sft-1", "sft-2", "sft-3"]
    (folders.work / "runs/sft-4").mkdir()
    assert jobs.reserve(folders, "sft", None)["run_dir"] == "runs/sft-5"
    assert jobs.reserve(folders, "sft", "mine")["run_dir"] == "mine"


@pytest.mark.parametrize(
    ("words", "job"),
    [
        (["logs", "gpu", "-f", "sft-1"], "sft-1"),
        (["logs", "gpu", "sft-1", "-f"], "sft-1"),
        (["stop", "gpu", "--grace", "5", "sft-1"], "sft-1"),
        (["pull", "--to", "x", "gpu", "sft-1"], "sft-1"),
        (["pull", "gpu"], None),
    ],
)
def test_words_come_in_any_order(words, job):
    assert parsed(words).job == job


def test_a_recipe_comes_behind_flags(monkeypatch):
    asked = []
    monkeypatch.setattr("lowrank_rlhf.remote.verb._shipment", lambda args: asked.append((args.recipe, args.overrides)))
    monkeypatch.setattr("lowrank_rlhf.remote.running.push", lambda host, shipment: 0)
    for words in (["gpu", "--dir", "x", "sft.yaml", "a=1"], ["gpu", "sft.yaml", "--dir", "x", "a=1"]):
        assert remote(parsed(["push", *words])) == 0
    assert asked == [("sft.yaml", ["a=1"])] * 2


@pytest.mark.parametrize(("stage", "gpus"), [("ppo", 2), ("grpo", 4), ("pipeline", 2), ("sft", 0), ("sft", -1)])
def test_what_does_not_run_on_several_cards_is_told_before_anything_is_sent(stage, gpus):
    with pytest.raises(UserError, match=f"--gpus: {gpus} is not for {stage}, which runs on one card"):
        start(ssh.Host("gpu", "x"), Shipment(stage, {"run_dir": None}), Start(gpus=gpus))


@pytest.mark.parametrize("words", [["logs", "gpu", "a", "b"], ["ps", "gpu", "a"], ["logs", "gpu", "--folow"]])
def test_words_too_many(words, capsys):
    with pytest.raises(SystemExit):
        parsed(words)
    assert "unrecognized arguments" in capsys.readouterr().err


def parsed(words):
    parser = argparse.ArgumentParser()
    add_remote_arguments(parser)
    return cli.parse(parser, words)
