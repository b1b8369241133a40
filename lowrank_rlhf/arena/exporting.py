"""Exports made from the browser: folders under `exports/` beside the store, each under a plain name."""

import io
import re
import zipfile
from contextlib import suppress
from pathlib import Path

from lowrank_rlhf.arena.votes.database import Store
from lowrank_rlhf.arena.votes.exports import ExportReport, export
from lowrank_rlhf.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
CARD = "README.md"
FRONT_MATTER = re.compile(r"\A---\n.*?^---\n+", re.DOTALL | re.MULTILINE)  # of the card, for programs


class Exports:
    """The exports of one store.

    Args:
        store: whose votes; `exports/` stands beside its file.
    """

    def __init__(self, store: Store):
        self.store = store
        self.folder = Path(store.path).absolute().parent / "exports"

    def names(self) -> list[str]:
        """The exports there are, the newest first."""
        if not self.folder.is_dir():
            return []
        written: dict[str, float] = {}
        for path in self.folder.iterdir():
            with suppress(OSError):  # no export, or one that is being replaced at this moment
                if NAME.fullmatch(path.name):
                    written[path.name] = (path / CARD).stat().st_mtime
        return sorted(written, key=lambda name: -written[name])

    def make(
        self, name: str, *, eval_fraction: float, seed: int = 0, blind_only: bool = False, overwrite: bool = False
    ) -> ExportReport:
        """Write the votes as data sets into `exports/NAME`.

        Raises:
            UserError: not a plain name, or an export of that name exists and is not to be replaced.
        """
        folder = self.path(name)
        self.folder.mkdir(exist_ok=True)
        return export(
            self.store, folder, eval_fraction=eval_fraction, seed=seed, blind_only=blind_only, overwrite=overwrite
        )

    def path(self, name: str) -> Path:
        """The folder of an export, which may not exist yet; never one outside `exports/`.

        Raises:
            UserError: not a plain name, or a link.
        """
        if not NAME.fullmatch(name):
            raise UserError(f"name: {name[:80]!r} is to be 1 to 64 of A-Z, a-z, 0-9, _ and -, a letter or digit first")
        path = self.folder / name
        if self.folder.is_symlink() or path.is_symlink():
            raise UserError(f"name: exports/{name} is a link to another place; exports do not follow links")
        return path

    def card(self, name: str) -> str:
        """The data card of an export, as people read it: without the header that is for programs.

        Raises:
            UserError: there is no such export.
        """
        try:
            return FRONT_MATTER.sub("", (self.path(name) / CARD).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"name: there is no export {name}") from error

    def zipped(self, name: str) -> bytes:
        """The files of an export, in a folder of its name.

        Raises:
            UserError: there is no such export, or another one is taking its place.
        """
        self.card(name)
        buffer = io.BytesIO()
        try:
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
                for path in sorted(self.path(name).iterdir()):
                    if path.is_file() and not path.is_symlink():
                        archive.write(path, f"{name}/{path.name}")
        except FileNotFoundError as error:
            raise UserError(f"name: {name} is being replaced at this moment; try again") from error
        return buffer.getvalue()
