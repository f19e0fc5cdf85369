"""A tiny Qwen3 directory, hand-made model chunks with megatron-core's names, and ranks that meet over gloo."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from loongforge.core import env
from loongforge.core.checkpoint.contract import WeightMove, WeightPart
from loongforge.core.model.weights import Copy, FuseGateUp, FuseQKV, WeightTable
from loongforge.core.testing.distributed import run_distributed

LAYERS, HIDDEN, FFN, HEADS, GROUPS, WIDTH, VOCAB = 3, 24, 40, 6, 2, 10, 101


@dataclass(frozen=True, kw_only=True)
class World:
    """Stand-in for the trainer's world."""

    rank: int
    size: int
    tp: Any
    pp: Any
    dp_cp: Any

    def barrier(self) -> None:
        dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, problems: list[str]) -> list[str]:
        return list(dict.fromkeys(problem for part in self.gather(problems) for problem in part))


def join(worker: env.Worker, *, tp: int, pp: int) -> World:
    dist.init_process_group("gloo", rank=worker.rank, world_size=worker.world_size, timeout=timedelta(seconds=60))
    dp = worker.world_size // tp // pp
    number = torch.arange(worker.world_size).reshape(pp, dp, tp)

    def mine(rows: torch.Tensor) -> Any:
        groups = [dist.new_group(row.tolist()) for row in rows]
        return next(group for group, row in zip(groups, rows, strict=True) if worker.rank in row)

    return World(
        rank=worker.rank,
        size=worker.world_size,
        tp=mine(number.reshape(-1, tp)),
        pp=mine(number.permute(1, 2, 0).reshape(-1, pp)),
        dp_cp=mine(number.permute(0, 2, 1).reshape(-1, dp)),
    )


def run_ranks(work: Callable[[World], Any], *, tp: int = 1, pp: int = 1, dp: int = 1) -> list[Any]:
    """`work(world)` on every rank, each a forked process; the picklable results by rank."""

    def body(worker: env.Worker) -> Any:
        world = join(worker, tp=tp, pp=pp)
        result = work(world)
        dist.barrier()
        dist.destroy_process_group()
        return result

    return run_distributed(body, tp * pp * dp, timeout=240)


def table(tied: bool) -> WeightTable:
    layer, hf = "decoder.layers.{layer}.", "model.layers.{layer}."
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    return WeightTable(
        rules=(
            Copy(megatron="embedding.word_embeddings.weight", hf="model.embed_tokens.weight", shard_dim=0, vocab=True),
            Copy(megatron=layer + "input_layernorm.weight", hf=hf + "input_layernorm.weight"),
            FuseQKV(
                megatron=layer + "self_attention.linear_qkv.weight",
                q=hf + "self_attn.q_proj.weight",
                k=hf + "self_attn.k_proj.weight",
                v=hf + "self_attn.v_proj.weight",
                num_attention_heads=HEADS,
                num_query_groups=GROUPS,
                kv_channels=WIDTH,
            ),
            Copy(megatron=layer + "self_attention.q_layernorm.weight", hf=hf + "self_attn.q_norm.weight"),
            Copy(megatron=layer + "self_attention.k_layernorm.weight", hf=hf + "self_attn.k_norm.weight"),
            Copy(megatron=layer + "self_attention.linear_proj.weight", hf=hf + "self_attn.o_proj.weight", shard_dim=1),
            Copy(megatron=layer + "pre_mlp_layernorm.weight", hf=hf + "post_attention_layernorm.weight"),
            FuseGateUp(
                megatron=layer + "mlp.linear_fc1.weight",
                gate=hf + "mlp.gate_proj.weight",
                up=hf + "mlp.up_proj.weight",
            ),
            Copy(megatron=layer + "mlp.linear_fc2.weight", hf=hf + "mlp.down_proj.weight", shard_dim=1),
            Copy(megatron="decoder.final_layernorm.weight", hf="model.norm.weight"),
            Copy(megatron="output_layer.weight", hf=head, shard_dim=0, vocab=True),
        ),
        ignored_hf=(r"lm_head\.weight",) if tied else (),
    )


def put(root: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A parameter full of NaN under a dotted name: what is not loaded shows."""
    *path, leaf = name.split(".")
    module = root
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(leaf, nn.Parameter(torch.full(shape, torch.nan, dtype=dtype)))


def chunk(
    tp: int, dtype: torch.dtype, *, tied: bool, layers: range = range(LAYERS), stage: tuple[bool, bool] = (True, True)
) -> nn.Module:
    """One pipeline chunk: global layers `layers`; `stage` says whether it is the first and the last."""
    first, last = stage
    rows = -(-VOCAB // tp)
    model = nn.Module()
    if first:
        put(model, "embedding.word_embeddings.weight", (rows, HIDDEN), dtype)
    for local, number in enumerate(layers):
        name = f"decoder.layers.{local}."
        put(model, name + "input_layernorm.weight", (HIDDEN,), dtype)
        qkv = (HEADS + 2 * GROUPS) * WIDTH // tp
        put(model, name + "self_attention.linear_qkv.weight", (qkv, HIDDEN), dtype)
        put(model, name + "self_attention.q_layernorm.weight", (WIDTH,), dtype)
        put(model, name + "self_attention.k_layernorm.weight", (WIDTH,), dtype)
        put(model, name + "self_attention.linear_proj.weight", (HIDDEN, HEADS * WIDTH // tp), dtype)
        put(model, name + "pre_mlp_layernorm.weight", (HIDDEN,), dtype)
        put(model, name + "mlp.linear_fc1.weight", (2 * FFN // tp, HIDDEN), dtype)
        put(model, name + "mlp.linear_fc2.weight", (HIDDEN, FFN // tp), dtype)
        layer: Any = model.get_submodule(name.rstrip("."))
        layer.layer_number = number + 1
    if last:
        put(model, "decoder.final_layernorm.weight", (HIDDEN,), dtype)
        if not (tied and first):
            put(model, "output_layer.weight", (rows, HIDDEN), dtype)
    return model


def chunks_of(world: World, dtype: torch.dtype, *, tied: bool, interleaved: bool = False) -> list[nn.Module]:
    """This rank's chunks: layers spread over stages, fewest on the last; interleaved: one layer a chunk."""
    tp, pp, stage = world.tp.size(), world.pp.size(), world.pp.rank()
    if interleaved:
        numbers = range(stage, LAYERS, pp)
        return [chunk(tp, dtype, tied=tied, layers=range(n, n + 1), stage=(n == 0, n == LAYERS - 1)) for n in numbers]
    each = -(-LAYERS // pp)
    layers = range(stage * each, min(LAYERS, (stage + 1) * each))
    return [chunk(tp, dtype, tied=tied, layers=layers, stage=(stage == 0, stage == pp - 1))]


def move(path: Path, world: World, chunks: list[nn.Module], *, tied: bool, **more: Any) -> WeightMove:
    part = WeightPart(
        component="foundation",
        chunks=chunks,
        table=table(tied),
        groups=world,  # pyright: ignore[reportArgumentType]
        vocab_size=VOCAB,
    )
    return WeightMove(
        path=path,
        parts=(part,),
        world=world,  # pyright: ignore[reportArgumentType]
        config=more.pop("config", {}),
        **more,
    )


@pytest.fixture
def kit() -> Any:
    """This file as a module: pytest's import mode keeps tests from importing one another."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def make_hf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_hf(tied, dtype, max_shard_size)`: a directory that transformers wrote, every number random."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(tied: bool, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB") -> Path:
        key = (tied, dtype, max_shard_size)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("hf")
            write_hf(made[key], tied, dtype, max_shard_size)
        return made[key]

    return make


def write_hf(path: Path, tied: bool, dtype: torch.dtype, max_shard_size: str) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=WIDTH,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model: Any = Qwen3ForCausalLM(config)
    model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "modeling_tiny.py").write_text("raise RuntimeError('the code of a checkpoint is never run')")
    (path / "train.py").write_text("")
