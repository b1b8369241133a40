"""The panel in real pseudo-terminals, read back as a person would see it, and the lines everywhere else."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console

from lowrank_rlhf import progress
from lowrank_rlhf.panel import FIGURES, Panel, panel, phases_line, sparkline

ROOT = Path(__file__).parent.parent
ROW = {
    "objective/scores": 0.5,
    "objective/kl": 1.5,
    "objective/length": 30.0,
    "objective/entropy": 60.0,
    "val/eos_rate": 0.75,
    "policy/clipfrac_avg": 0.125,
    "val/explained_variance": -0.25,
    "time/generate": 3.0,
    "memory/generate_gib": 2.5,
}

CHILD = """
import os, signal, sys
from lowrank_rlhf.panel import panel
ROW = {row}
signal.alarm(120)  # so that nothing hangs
try:
    with panel("ppo", 3) as line:
        for step in (1, 2, 3):
            line.step(step, 100, ROW | {{"objective/scores": float(step)}})
            print(f"said in step {{step}}")
            if step == 2:
                line.warn(step, "it looks wrong")
                {then}
    print("after the panel")
except KeyboardInterrupt:
    print("interrupted")
"""


class Terminal:
    """Enough of a terminal to read what rich writes: text, carriage return, line feed, cursor up, erase line."""

    def __init__(self):
        self.lines, self.row, self.column, self.cursor = [""], 0, 0, True

    def write(self, text):
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", text):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif part.endswith("A") and part.startswith("\x1b"):
                self.row -= int(part[2:-1])
            elif part == "\x1b[2K":
                self.lines[self.row] = ""
            elif part in ("\x1b[?25l", "\x1b[?25h"):
                self.cursor = part.endswith("h")
            elif part.startswith("\x1b"):
                assert part.endswith("m"), f"unknown control sequence {part!r}"
            else:
                before = self.lines[self.row].ljust(self.column)
                self.column += len(part)
                self.lines[self.row] = before[: self.column - len(part)] + part + before[self.column :]
        return self

    def shown(self):
        return [line.rstrip() for line in self.lines if line.strip()]


# A terminal's; started in the background, the tests themselves are told to ignore it, and so would be their child
CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def in_terminal(then="pass", columns=100, rows=40, **environment):
    """Exit status and raw output of the child in a pseudo-terminal of that size."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    child = subprocess.Popen(
        [sys.executable, "-c", CTRL_C + CHILD.format(row=ROW, then=then)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env={**kept, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", **environment},
        start_new_session=True,
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            said += os.read(ours, 65536)
        except OSError:  # the child has closed its side
            break
    os.close(ours)
    return child.wait(60), said.decode()


def blocks(lines):
    """Where panels stand among the lines."""
    return [i for i, line in enumerate(lines) if line.startswith("ppo  ━")]


def test_the_panel_is_redrawn_in_place_with_what_was_printed_above_it():
    status, said = in_terminal()
    lines = Terminal().write(said).shown()
    (at,) = blocks(lines)
    assert status == 0
    assert lines[:at] == [
        "said in step 1",
        "said in step 2",
        "ppo: warning at step 2: it looks wrong",
        "said in step 3",
    ]
    assert re.search(r" 3/3  0:00 left  \d+\.\d s each$", lines[at])
    assert re.fullmatch(r"score +▁▄█ +1\.000 →  3\.000", lines[at + 1])
    assert [line.split("  ")[0] for line in lines[at + 1 : at + 9]] == [figure.label for figure in FIGURES]
    assert lines[at + 9 :] == ["generate 3.0 s · 2.5 GiB", "! step 2: it looks wrong", "after the panel"]


def test_an_exception_leaves_the_terminal_in_order():
    status, said = in_terminal(then="raise ValueError('broken')")
    terminal = Terminal().write(said)
    lines = terminal.shown()
    (at,) = blocks(lines)
    assert status == 1
    assert terminal.cursor, "the cursor is visible again"
    assert lines[-1] == "ValueError: broken"
    assert at < lines.index("Traceback (most recent call last):")


def test_ctrl_c_leaves_the_terminal_in_order():
    status, said = in_terminal(then="os.kill(os.getpid(), signal.SIGINT)")
    terminal = Terminal().write(said)
    assert status == 0
    assert terminal.cursor
    assert terminal.shown()[-1] == "interrupted"
    assert len(blocks(terminal.shown())) == 1


def test_a_signal_handler_that_prints_is_heard():
    """As Run.stop_on_signal does on the first Ctrl-C."""
    handler = "signal.signal(signal.SIGINT, lambda *a: print('stopping after this step'))"
    status, said = in_terminal(then=f"{handler}; os.kill(os.getpid(), signal.SIGINT)")
    lines = Terminal().write(said).shown()
    assert status == 0
    assert lines.index("stopping after this step") < blocks(lines)[0]


@pytest.mark.parametrize(
    "size", [{"columns": 79}, {"rows": 17}, {"TERM": "dumb"}, {"PYTHONIOENCODING": "ascii"}], ids=str
)
def test_a_terminal_that_cannot_show_it_gets_lines(size):
    status, said = in_terminal(**size)
    lines = Terminal().write(said).shown()
    assert status == 0
    assert re.fullmatch(
        r"ppo step 1/3  scores 1\.000  kl 1\.500  length 30\.000  \d+ tokens/s  \d+:\d\d left", lines[0]
    )
    assert len(lines) == 3 + 3 + 1 + 1


def test_redirected_output_has_lines_and_no_control_characters():
    """Also where FORCE_COLOR makes rich believe in a terminal."""
    result = subprocess.run(
        [sys.executable, "-c", CHILD.format(row=ROW, then="pass")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FORCE_COLOR": "1", "TERM": "xterm"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "\x1b" not in result.stdout + result.stderr
    assert result.stdout.count("ppo step") == 3


def test_both_say_how_fast_a_step_was(capsys, monkeypatch):
    """100 tokens in 2 seconds."""
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with panel("ppo", 2) as line:
        assert line.step(1, 100, ROW) == {"seconds": 2, "tokens_per_second": 50.0}
    assert Panel("ppo", 2, 0, [], lambda drawn: None).step(1, 100, ROW) == {"seconds": 2, "tokens_per_second": 50.0}


def test_lines_show_what_a_row_has(capsys):
    with panel("grpo", 2) as line:
        line.step(1, 100, {"objective/scores": 1.0})
        line.note("held out 0.5")
    out = capsys.readouterr().out
    assert "scores 1.000" in out
    assert "kl" not in out
    assert out.endswith("held out 0.5\n")


# The block


def drawn(rows, width=100, total=60, history=(), warning=""):
    console = Console(record=True, width=width, height=40, file=io.StringIO())
    block = Panel("ppo", total, 0, history, lambda drawn: None)
    for step, row in enumerate(rows, start=1):
        block.step(step, 100, row)
    if warning:
        block.warn(1, warning)
    console.print(block)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("steps", [0, 1, 12, 500])
def test_no_line_is_too_long_and_none_is_broken(width, steps):
    lines = drawn([ROW] * steps, width, total=max(steps, 1), warning="word " * 200)
    assert len(lines) == (1 if steps == 0 else 1 + len(FIGURES)) + 1 + 2
    assert max(map(len, lines)) <= width
    assert lines[-1].endswith(" …")


def test_a_resumed_run_shows_the_whole_curve():
    """Rows 0 to 2 of metrics.jsonl, then a third; row 0 is the rollout of row 1."""
    rows = [{"step": step, "objective/scores": float(step or 1)} for step in (0, 1, 2)]
    (line,) = [line for line in drawn([{"objective/scores": 3.0}], history=rows) if line.startswith("score")]
    assert re.fullmatch(r"score +▁▄█ +1\.000 →  3\.000 *", line)


def test_numbers_that_are_none_are_shown_as_such():
    lines = drawn([ROW, ROW | {"objective/kl": float("nan"), "objective/scores": float("-inf")}])
    assert re.search(r"▄ +1\.50 →  nan", lines[2])
    assert re.search(r"▄ +0\.500 →  -inf", lines[1])


def test_phases_without_memory_and_without_phases():
    assert phases_line({"time/score": 1.0}) == "score 1.0 s"
    assert phases_line({}) == ""


def test_a_long_curve_is_the_means_of_its_parts():
    """1,000 values that rise, in 10 parts; and a spike of one in a hundred is lost in its part's mean."""
    assert sparkline([float(i) for i in range(1000)], 8) == "▁▂▃▄▅▆▇█"
    assert len(sparkline([1.0, 2.0, 3.0], 2)) == 2


def test_a_curve_of_nothing_is_blank():
    assert sparkline([], 5) == ""
    assert sparkline([float("nan")] * 3, 5) == "   "
