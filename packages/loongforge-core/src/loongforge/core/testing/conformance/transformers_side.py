"""The other side of the comparison: a process with transformers and nothing of the trainer.

No substitution of a platform can reach it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

WEIGHTS, BATCH, LOGITS, RESULT = "weights", "batch.pt", "logits.pt", "transformers.pt"
"""In the directory of a case: the exported model, the batch and the logits of our side, the logits of this one."""

GRADIENTS = "gradients-transformers"
"""Where this side leaves its gradients, in Hugging Face layout."""

UNKNOWN = 3
"""Exit code when transformers has no class of the architecture's name."""


def run(folders: list[str]) -> int:
    """Forward and backward in fp32 on the batch that our side used, for every case; the exit code."""
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for folder in map(Path, folders):
        name = json.loads((folder / WEIGHTS / "config.json").read_text())["architectures"][0]
        model_class = getattr(transformers, name, None)
        if model_class is None:
            print(f"transformers {transformers.__version__} has no class {name}", file=sys.stderr)
            return UNKNOWN
        model = model_class.from_pretrained(folder / WEIGHTS, local_files_only=True).float().eval()
        batch = torch.load(folder / BATCH)
        logits = model(input_ids=batch["tokens"]).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        mask = batch["loss_mask"].flatten()
        ((losses * mask).sum() / mask.sum()).backward()
        torch.save(logits.detach(), folder / RESULT)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        model.save_pretrained(folder / GRADIENTS)  # under the names that a checkpoint has
    return 0
