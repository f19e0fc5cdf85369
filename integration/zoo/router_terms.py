"""What training adds for routers and how evenly they choose, in plain torch on transformers' own logits."""

from __future__ import annotations

from typing import Any


def watch(model: Any) -> tuple[list[Any], list[Any]]:
    """Lists that a forward pass fills, one entry a layer with experts: logits and chosen experts, `[tokens, ...]`."""
    logits: list[Any] = []
    chosen: list[Any] = []
    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_pre_hook(
                lambda gate, inputs: logits.append(inputs[0].flatten(0, -2).float() @ gate.weight.float().T)
            )
        elif name.endswith(".experts"):
            module.register_forward_pre_hook(lambda experts, inputs: chosen.append(inputs[1]))
    return logits, chosen


def losses(logits: Any, chosen: Any, sequences: int, *, kind: str, sigmoid: bool, made: bool) -> tuple[Any, Any]:
    """Balance loss (1 is even) and z-loss of one layer, of micro-batches of one sequence each.

    Balance: DeepSeek-V2 (2024), eq. 23 to 25, and DeepSeek-V3 (2024), eq. 17 to 20, with the choices that were `made`
    or those of the highest scores; over the whole step (`global_aux_loss`) the sequences before count too. z-loss:
    ST-MoE (2022), eq. 5.
    """
    import torch

    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    scores = scores / scores.sum(-1, keepdim=True)
    best = chosen if made else scores.topk(chosen.size(-1)).indices
    picked = torch.zeros_like(scores).scatter(-1, best, 1.0).view(sequences, -1, scores.size(-1))
    share = picked.mean(1) / chosen.size(-1)
    if kind == "global_aux_loss":
        share = share.cumsum(0) / torch.arange(1, sequences + 1)[:, None]
    mean = scores.view(sequences, -1, scores.size(-1)).mean(1)
    balance = scores.size(-1) * (share * mean).sum(-1).mean()
    return balance, logits.exp().sum(-1).log().square().mean()


def load(chosen: Any, experts: int) -> dict[str, float]:
    """`max` and `min` relative to the mean, and the share of `idle` experts."""
    counts = [int((chosen == number).sum()) for number in range(experts)]
    mean = chosen.numel() / experts
    return {"max": max(counts) / mean, "min": min(counts) / mean, "idle": counts.count(0) / experts}
