"""Checkpoints, references and runs that several tests look at, each made once."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import proof
import torch
from case import LAYOUTS
from cases import CASES
from reference import Reference
from safetensors.torch import load_file, save_file

from loongforge.ckpt.verify.batch import make_batch
from loongforge.ckpt.verify.difference import Side
from loongforge.core.testing import run_distributed


class Keeper:
    """One directory for each case below `scratch`."""

    def __init__(self, reference: Reference, scratch: Path) -> None:
        self.reference = reference
        self._scratch = scratch
        self._sides: dict[str, Side] = {}

    def checkpoint(self, name: str) -> Path:
        """The case's Hugging Face directory."""
        directory = self._scratch / name / "checkpoint"
        if not directory.exists():
            self.reference.write(name, directory)
        return directory

    def side(self, name: str) -> Side:
        """What the reference computes of `make_batch`."""
        if name not in self._sides:
            directory, scratch = self.checkpoint(name), self._scratch / name
            batch, out = scratch / "batch.safetensors", scratch / "reference.safetensors"
            save_file(make_batch(proof.config_of(CASES[name], directory, "one"), proof.SEQUENCES), batch)
            loss = self.reference.measure(name, directory, batch, out)["loss"]
            tensors = load_file(out)
            self._sides[name] = Side(loss=loss, logits=tensors.pop("logits"), gradients=tensors)
        return self._sides[name]

    def run(self, name: str, layout: str) -> Path:
        """What `prove` left of this case in this layout."""
        scratch = self._scratch / name / layout
        if not scratch.exists():
            config = proof.config_of(CASES[name], self.checkpoint(name), layout)
            scratch.mkdir()
            run_distributed(partial(proof.prove, config=config, scratch=scratch), LAYOUTS[layout][1])
        return scratch

    def halved(self, name: str) -> Path:
        """The checkpoint in bf16, as released: what the reference keeps in fp32 besides, a router's bias, stays."""
        directory = self._scratch / name / "bf16"
        if not directory.exists():
            whole = self.checkpoint(name)
            directory.mkdir()
            (directory / "config.json").write_bytes((whole / "config.json").read_bytes())
            tensors = {
                key: tensor if key.endswith("e_score_correction_bias") else tensor.to(torch.bfloat16)
                for key, tensor in proof.read(whole).items()
            }
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
