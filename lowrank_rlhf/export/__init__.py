"""A role of a run as a folder for plain transformers and PEFT: an adapter, or a merged 16-bit model."""

from lowrank_rlhf.export.verb import Export, export

__all__ = ["Export", "export"]
