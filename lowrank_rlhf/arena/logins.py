"""Who may use the app: names with hashed passwords in one file of JSON lines.

{"name": "ana", "owner": false, "salt": "…", "n": 32768, "r": 8, "p": 1, "hash": "…"}
"""

import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

from lowrank_rlhf.errors import UserError

N, R, P = 2**15, 8, 1  # scrypt: 32 MiB and about 0.1 s a password
MIN_PASSWORD, MAX_PASSWORD = 8, 1024
NAME = re.compile(r"\w[\w.@ -]{0,62}\w|\w")
MAX_FAILURES, WINDOW_SECONDS = 5, 60.0  # of one name from one address; of all names from one address, ten times that


@dataclass(frozen=True)
class Login:
    """One line of the file. `salt` and `hash` are hexadecimal; n, r and p are scrypt's cost.

    An owner sees everything, an annotator only the voting page.
    """

    name: str
    owner: bool
    salt: str
    n: int
    r: int
    p: int
    hash: str

    def matches(self, password: str) -> bool:
        """Whether this is the password; takes the same time for a wrong one."""
        return hmac.compare_digest(_scrypt(password, self.salt, self.n, self.r, self.p), self.hash)


NOBODY = Login("", False, "00" * 16, N, R, P, "00" * 32)  # checked in place of an unknown name: the same time


class Logins:
    """The names of one file, and who failed lately.

    Args:
        path: the file, or where it is to be.
        known: its lines by name.
    """

    def __init__(self, path: Path, known: dict[str, Login]):
        self.path, self._known = path, known
        self._failures: dict[tuple[str, str], deque[float]] = {}
        self._lock = threading.Lock()

    @classmethod
    def read(cls, path: str | Path) -> "Logins":
        """The logins of a file.

        Raises:
            UserError: no such file, a line that is no login, or a file that others on this machine can write.
        """
        path = Path(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"--logins: {path} cannot be read: {error}") from error
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UserError(f"--logins: {path} can be read by others on this machine; run: chmod 600 {path}")
        known: dict[str, Login] = {}
        for number, line in enumerate(lines, start=1):
            if line.strip():
                login = _parse(line, f"{path}, line {number}")
                if login.name in known:
                    raise UserError(f"{path}, line {number}: {login.name} is there twice; delete one of the lines")
                known[login.name] = login
        if not known:
            raise UserError(f"--logins: {path} has no names; add one: votes add-annotator NAME --logins {path} --owner")
        return cls(path, known)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def is_owner(self, name: str) -> bool:
        return name in self._known and self._known[name].owner

    def check(self, name: str, password: str, client: str = "") -> bool:
        """Whether name and password belong together; an unknown name takes as long as a wrong password.

        Args:
            client: address of who asks, for the limit on failures.
        """
        login = self._known.get(name, NOBODY)
        right = len(password) <= MAX_PASSWORD and login.matches(password) and login is not NOBODY
        with self._lock:
            if right:
                self._failures.pop((client, name), None)
            else:
                for key in _keys(name, client):
                    self._failures.setdefault(key, deque(maxlen=10 * MAX_FAILURES)).append(time.monotonic())
        return right

    def wait_seconds(self, name: str, client: str = "") -> float:
        """How long this client is to wait before the next password for this name is looked at; 0 is not at all."""
        waits = [0.0]
        with self._lock:
            self._forget()
            for key, limit in zip(_keys(name, client), (MAX_FAILURES, 10 * MAX_FAILURES), strict=True):
                failures = self._failures.get(key, ())
                if len(failures) >= limit:
                    waits.append(failures[-limit] + WINDOW_SECONDS - time.monotonic())
        return max(waits)

    def _forget(self) -> None:
        old = time.monotonic() - WINDOW_SECONDS
        for key in [key for key, failures in self._failures.items() if failures[-1] < old]:
            del self._failures[key]


def add(path: str | Path, name: str, password: str, owner: bool = False) -> None:
    """Write a login into a file, which is made where there is none (mode 600); a name that is there is replaced.

    Raises:
        UserError: a name or password that cannot be used, or a file that is not one of logins.
    """
    path = Path(path)
    if not NAME.fullmatch(name):
        raise UserError(f"name: {name!r} is to be 1 to 64 letters, digits, spaces and . _ @ -, no space at its ends")
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise UserError(f"password: it has {len(password)} characters, use {MIN_PASSWORD} to {MAX_PASSWORD}")
    known = dict(Logins.read(path)._known) if path.exists() and path.stat().st_size else {}
    salt = secrets.token_hex(16)
    known[name] = Login(name, owner, salt, N, R, P, _scrypt(password, salt, N, R, P))
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise UserError(f"--logins: {path} cannot be written: {error}") from error
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(login), ensure_ascii=False) + "\n" for login in known.values())
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _parse(line: str, where: str) -> Login:
    types = {"name": str, "owner": bool, "salt": str, "n": int, "r": int, "p": int, "hash": str}
    try:
        row = json.loads(line)
        if set(row) != set(types) or any(type(row[key]) is not kind for key, kind in types.items()):
            raise ValueError("its keys are to be name, owner, salt, n, r, p and hash")
        bytes.fromhex(row["salt"]), bytes.fromhex(row["hash"])
        if not NAME.fullmatch(row["name"]) or not 2**14 <= row["n"] <= 2**20 or row["r"] != R or row["p"] != P:
            raise ValueError("a name or cost that add-annotator does not write")
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: not a login ({error}); delete it and run votes add-annotator again") from error
    return Login(**row)


def _scrypt(password: str, salt: str, n: int, r: int, p: int) -> str:
    spent = 128 * n * r + 2**20
    return hashlib.scrypt(
        password.encode("utf-8", "surrogatepass"), salt=bytes.fromhex(salt), n=n, r=r, p=p, maxmem=spent, dklen=32
    ).hex()


def _keys(name: str, client: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return (client, name), (client, "")
