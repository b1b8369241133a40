"""Which adapters a run directory holds, looked up without loading anything."""

from pathlib import Path

ANSWERING = ("policy", "sft")  # whose adapter of a run answers: the first that is there


def adapter_file(run_dir: str | Path, role: str) -> Path:
    return Path(run_dir, "adapters", role, "adapter_model.safetensors")


def answering_role(run_dir: str | Path) -> str | None:
    """The role of a run that answers prompts; None where it has none."""
    return next((role for role in ANSWERING if adapter_file(run_dir, role).is_file()), None)
