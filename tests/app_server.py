"""The app as its user starts it: `python app.py …` in a process of its own."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
START_SECONDS = 180  # imports of torch and gradio, on a machine that does other things too


class App:
    """A running app.

    Attributes:
        url: of the workbench, with a slash at its end; the voting page is at `url + "vote/"`.
        output: lines that it printed so far.
    """

    def __init__(self, *flags: str, cwd: Path):
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py"), "--port", "0", *flags],
            cwd=cwd,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output: list[str] = []
        self.url = ""
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._ready.wait(START_SECONDS) or not self.url:
            self.process.kill()
            raise AssertionError("the app did not start:\n" + "".join(self.output))

    def _read(self) -> None:
        for line in self.process.stdout:
            self.output.append(line)
            if line.startswith("workbench"):
                self.url = line.split()[1].replace("0.0.0.0", "127.0.0.1")
            if line.startswith("blind votes"):
                self._ready.set()
        self._ready.set()

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Send a signal; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(seconds)


@contextmanager
def running(*flags: str, cwd: Path) -> Iterator[App]:
    """An app while the block runs; killed after it."""
    app = App(*flags, cwd=cwd)
    try:
        yield app
    finally:
        app.process.kill()
        app.process.wait()
