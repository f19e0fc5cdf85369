"""The other side: transformers on the same batch, in a process of its own.

`python -m loongforge.ckpt.verify.reference HF_DIR SCRATCH` imports nothing of the trainer, so that no substitution
can reach it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from loongforge.core.errors import CheckpointError

BATCH, RESULT, GRADIENTS = "batch.safetensors", "reference.safetensors", "reference"
"""What is handed over in SCRATCH: the batch, logits and loss, gradients under their names in a checkpoint."""


def run_reference(directory: Path, scratch: Path) -> None:
    """Start the process and wait; `CheckpointError` with its last line when transformers cannot do it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__, str(directory), str(scratch)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(f"{directory}: transformers cannot load and run this model: {reason}")


def main(directory: str, scratch: str) -> None:
    """fp32 on the CPU: forward, mean loss over the unmasked tokens, backward; leaves the results in `scratch`."""
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    batch = load_file(Path(scratch) / BATCH)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    if json.loads((Path(directory) / "config.json").read_text()).get("quantization_config"):
        model = _unquantised(model)
    logits = model(input_ids=batch["tokens"]).logits
    losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    mask = batch["loss_mask"].flatten()
    loss = (losses * mask).sum() / mask.sum()
    loss.backward()
    save_file({"logits": logits.detach().contiguous(), "loss": loss.detach()}, Path(scratch) / RESULT)
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None, "every parameter of a causal language model has a gradient"
            parameter.copy_(parameter.grad)
    # Written by transformers itself: it says under which names the gradients' tensors lie in a checkpoint.
    model.save_pretrained(Path(scratch) / GRADIENTS)


def _unquantised(model: Any) -> Any:
    """The numbers that transformers read from quantised files in a model of its own: the other writes gradients as it
    has read the weights."""
    plain = type(model)(model.config)  # from which transformers has taken the quantisation away
    plain.load_state_dict(model.state_dict())
    return plain.float().eval()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
