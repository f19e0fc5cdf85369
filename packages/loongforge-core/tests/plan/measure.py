"""Build the small decoder on every rank and print what it really holds and keeps, to check the plan against."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import plan_tiny as tiny

from loongforge.core import env
from loongforge.core.cli.launch import launch
from loongforge.core.config.run import RunConfig
from loongforge.core.plan import Plan


def start() -> None:
    from loongforge.core.megatron.start import start_megatron
    from loongforge.core.platform import choose

    start_megatron(choose("cpu").platform())


def weigh(config: RunConfig) -> None:
    """Print parameters of this rank, and with one stage the bytes its forward pass keeps for the backward pass."""
    start()
    from loongforge.core.megatron.groups import join
    from loongforge.core.platform import choose

    worker = env.worker()
    assert worker is not None
    plan = Plan.of(config, worker.world_size)
    with join(plan.layout, worker, choose("cpu").platform(), 2) as world:
        chunks = build(plan, world)
        parameters = sum(one.numel() for chunk in chunks for one in chunk.parameters())
        kept = activations(plan, world, chunks[0]) if plan.layout.pp == 1 else None
        answer = {"rank": worker.rank, "stage": world.pp.rank(), "parameters": parameters, "kept": kept}
        print(json.dumps(answer), flush=True)


def build(plan: Plan, world: Any) -> list[Any]:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from loongforge.core.megatron.language_model import build_language_model
    from loongforge.core.megatron.layers import SDPAttention
    from loongforge.core.megatron.specs import layers_for
    from loongforge.core.megatron.transformer_config import compute_type, transformer_config
    from loongforge.core.model.contract import BuildContext

    model_parallel_cuda_manual_seed(1)
    ours = layers_for(world.platform, compute_type(plan.config.train))
    attention = partial(SDPAttention, packed_attention=unmasked())  # as on accelerators: torch's fused attention
    layers = replace(ours, core_attention=attention)
    config = transformer_config(plan.geometry, plan.config, plan.layout, layers, initialise=True)
    last = plan.layout.num_chunks - 1
    return [
        build_language_model(
            plan.geometry,
            BuildContext(
                config=config,
                groups=world.groups,
                layers=layers,
                padded_vocab_size=plan.padded_vocab_size,
                seq_length=plan.seq_length,
                pre_process=world.is_first_stage and number == 0,
                post_process=world.is_last_stage and number == last,
                vp_stage=number if plan.layout.vpp else None,
            ),
        )
        for number in range(plan.layout.num_chunks)
    ]


def unmasked() -> Any:
    """`packed_attention` that keeps what torch's kernels for many lengths do: its operands, output and statistics."""
    import torch

    from loongforge.kernels.packed_attention.sdpa import packed_attention

    class Unmasked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any, parts: Any, scale: float) -> Any:
            output = packed_attention(query, key, value, parts, scale)
            statistics = torch.empty(query.shape[1], query.shape[0])
            ctx.save_for_backward(query, key, value, output, statistics)
            ctx.rest = parts, scale
            return output

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            operands = [one.detach().requires_grad_() for one in ctx.saved_tensors[:3]]
            with torch.enable_grad():
                output = packed_attention(*operands, *ctx.rest)
            return *torch.autograd.grad(output, operands, grad), None, None

    return Unmasked.apply


def activations(plan: Plan, world: Any, model: Any) -> int:
    """Bytes of the storages that autograd and the loss keep after a forward pass, parameters and inputs left out."""
    import torch

    tokens = torch.randint(plan.geometry.vocab_size, (plan.micro_batch_size, plan.seq_length // plan.layout.cp))
    positions = torch.arange(tokens.size(1))[None].expand_as(tokens)
    ours = {one.untyped_storage().data_ptr() for one in (*model.parameters(), tokens, positions)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, positions, labels=tokens, ahead=further(plan, tokens))
    for found in ahead_of_time(loss):
        keep(found)
    held = sum(storage.nbytes() for storage in kept.values())  # now, because recompute gives some of it back
    loss.sum().backward()
    return held


def ahead_of_time(loss: Any) -> list[Any]:
    """The gradients that the loss computed in its forward pass."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [next_node for next_node, _ in node.next_functions]
    found = [one for node in seen for one in getattr(node, "gradients", ()) if one is not None]
    assert found, "the loss computes gradients ahead"
    return found


def further(plan: Plan, tokens: Any) -> Any:
    """What further layers see, None without."""
    from loongforge.core.model.contract import Ahead

    if not (depths := plan.geometry.prediction_layers):
        return None
    shifted = tokens[None].repeat(depths, 1, 1)
    return Ahead(tokens=shifted, labels=shifted, loss_mask=shifted.float())


if __name__ == "__main__":
    run = tiny.run(**json.loads(sys.argv[2]))
    raise SystemExit(launch(run, weigh, nproc=int(sys.argv[1]), preload=start))
