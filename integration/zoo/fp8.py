"""A checkpoint stored in fp8 with scales for blocks, and the same numbers without."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

PLAIN = ("embed_tokens", "lm_head", "shared_head", "mlp.gate.", "norm", "conv1d")
"""Parts of names of the tensors that releases leave as they are."""
LARGEST = 448.0
"""Of float8_e4m3fn."""


def quantise(source: Path, stored: Path, numbers: Path, block: tuple[int, int]) -> int:
    """Writes `stored`, fp8 with scales, and `numbers`, what they stand for in fp32; how many tensors are fp8.

    Value = fp8 number x scale of its block, written here in its plainest form.
    """
    from proof import read

    fp8: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in read(source).items():
        if tensor.dim() < 2 or any(part in name for part in PLAIN):
            fp8[name] = plain[name] = tensor
            continue
        rows, columns = (-(-size // length) for size, length in zip(tensor.shape, block, strict=True))
        small, back, scales = torch.empty_like(tensor), torch.empty_like(tensor), torch.empty(rows, columns)
        for row in range(rows):
            for column in range(columns):
                here = tuple(
                    slice(at * length, (at + 1) * length) for at, length in zip((row, column), block, strict=True)
                )
                scale = tensor[here].abs().max() / LARGEST
                small[here] = (tensor[here] / scale).to(torch.float8_e4m3fn).float()
                back[here], scales[row, column] = small[here] * scale, scale
        fp8[name], fp8[name + "_scale_inv"] = small.to(torch.float8_e4m3fn), scales
        plain[name] = back
    config = json.loads((source / "config.json").read_text())
    said = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(block)}
    for path, tensors, more in ((stored, fp8, {"quantization_config": said}), (numbers, plain, {})):
        path.mkdir()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config | more))
    return sum(tensor.dtype == torch.float8_e4m3fn for tensor in fp8.values())
