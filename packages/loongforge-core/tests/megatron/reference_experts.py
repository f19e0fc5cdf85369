"""Tiny models with experts on transformers' side: weights, loss, gradients, by the names of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import router_losses
import torch
import transformers

from loongforge.core.config.experts import ExpertConfig
from loongforge.core.model.geometry import ExpertGeometry, LatentGeometry, TransformerGeometry
from loongforge.core.watch.expert_load import ExpertLoad

LENGTH, SAMPLES = 16, 8


def qwen3_moe() -> TransformerGeometry:
    """Qwen3-MoE's blocks; every size differs from every other."""
    return TransformerGeometry(
        num_layers=2, hidden_size=32, ffn_hidden_size=56, num_attention_heads=4, num_query_groups=2, kv_channels=12,
        vocab_size=90, max_position_embeddings=64, norm_epsilon=1e-6, rotary_base=10000.0, tie_word_embeddings=False,
        qk_layernorm=True,
        experts=ExpertGeometry(num_experts=6, topk=2, ffn_hidden_size=20),
    )  # fmt: skip


def deepseek3(q_lora_rank: int | None = 18, *, stretched: bool = True) -> TransformerGeometry:
    """DeepSeek-V3's blocks: a dense layer, then latent attention with group-limited experts and a shared one."""
    return TransformerGeometry(
        num_layers=2, hidden_size=32, ffn_hidden_size=56, num_attention_heads=4, num_query_groups=4, kv_channels=22,
        vocab_size=90, max_position_embeddings=64, norm_epsilon=1e-4, rotary_base=10000.0, tie_word_embeddings=False,
        experts=ExpertGeometry(
            num_experts=8, topk=4, ffn_hidden_size=20, first_dense_layers=1, score_function="sigmoid", scaling=2.5,
            num_groups=4, topk_groups=2, expert_bias=True, shared_ffn_hidden_size=28,
        ),
        latent=LatentGeometry(
            q_lora_rank=q_lora_rank, kv_lora_rank=26, qk_nope_head_dim=14, qk_rope_head_dim=8, v_head_dim=10,
            rope_factor=8.0 if stretched else 1.0, original_max_position_embeddings=8, mscale=0.8, mscale_all_dim=1.0,
        ),
    )  # fmt: skip


def reference(geometry: TransformerGeometry) -> Any:
    """transformers' model of the same shape, every parameter and the expert bias random."""
    experts = geometry.experts
    assert experts is not None
    sizes: dict[str, Any] = {
        "num_hidden_layers": geometry.num_layers, "hidden_size": geometry.hidden_size,
        "intermediate_size": geometry.ffn_hidden_size, "num_attention_heads": geometry.num_attention_heads,
        "num_key_value_heads": geometry.num_query_groups, "vocab_size": geometry.vocab_size,
        "max_position_embeddings": geometry.max_position_embeddings, "rms_norm_eps": geometry.norm_epsilon,
        "tie_word_embeddings": False, "moe_intermediate_size": experts.ffn_hidden_size,
        "num_experts_per_tok": experts.topk, "norm_topk_prob": experts.normalise_topk,
        "attn_implementation": "eager",
    }  # fmt: skip
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": geometry.rotary_base}
    if (latent := geometry.latent) is not None:
        if latent.rope_factor != 1:
            rope |= {
                "rope_type": "yarn", "factor": latent.rope_factor, "mscale": latent.mscale,
                "original_max_position_embeddings": latent.original_max_position_embeddings,
                "beta_fast": latent.beta_fast, "beta_slow": latent.beta_slow, "mscale_all_dim": latent.mscale_all_dim,
            }  # fmt: skip
        assert experts.shared_ffn_hidden_size is not None
        config = transformers.DeepseekV3Config(
            **sizes, rope_parameters=rope, q_lora_rank=latent.q_lora_rank, kv_lora_rank=latent.kv_lora_rank,
            qk_nope_head_dim=latent.qk_nope_head_dim, qk_rope_head_dim=latent.qk_rope_head_dim,
            v_head_dim=latent.v_head_dim, n_routed_experts=experts.num_experts, n_shared_experts=1,
            n_group=experts.num_groups, topk_group=experts.topk_groups, routed_scaling_factor=experts.scaling,
            first_k_dense_replace=experts.first_dense_layers,
        )  # fmt: skip
        kind = transformers.DeepseekV3ForCausalLM
    else:
        config = transformers.Qwen3MoeConfig(
            **sizes, rope_parameters=rope, head_dim=geometry.kv_channels, num_experts=experts.num_experts,
            mlp_only_layers=list(range(experts.first_dense_layers)),
        )  # fmt: skip
        kind = transformers.Qwen3MoeForCausalLM
    model = kind(config)
    if experts.shared_ffn_hidden_size is not None:  # transformers has no width of its own for the shared expert
        width = experts.shared_ffn_hidden_size
        for layer in model.model.layers[experts.first_dense_layers :]:
            shared = layer.mlp.shared_experts
            shared.gate_proj = torch.nn.Linear(geometry.hidden_size, width, bias=False)
            shared.up_proj = torch.nn.Linear(geometry.hidden_size, width, bias=False)
            shared.down_proj = torch.nn.Linear(width, geometry.hidden_size, bias=False)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        buffers = {name: one for name, one in model.named_buffers() if name.endswith("correction_bias")}
        for name, tensor in (dict(model.named_parameters()) | buffers).items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.2 * noise if tensor.dim() == 1 and "norm" in name else 0.15 * noise)
    return model.eval()


def ours_of(tensors: dict[str, torch.Tensor], geometry: TransformerGeometry) -> dict[str, torch.Tensor]:
    """transformers' parameters, or their gradients, by whole-model name."""
    take, found = dict(tensors), {}
    found["embedding.word_embeddings.weight"] = take.pop("model.embed_tokens.weight")
    found["decoder.final_layernorm.weight"] = take.pop("model.norm.weight")
    found["output_layer.weight"] = take.pop("lm_head.weight")
    for number in range(geometry.num_layers):
        theirs, here = f"model.layers.{number}.", f"decoder.layers.{number}."
        layer = {name.removeprefix(theirs): take.pop(name) for name in list(take) if name.startswith(theirs)}
        found |= {here + name: tensor for name, tensor in _layer_of(layer, geometry).items()}
        assert not layer, layer.keys()
    assert not take, take.keys()
    return found


def _layer_of(take: dict[str, torch.Tensor], geometry: TransformerGeometry) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    pairs = {
        "input_layernorm": "input_layernorm", "post_attention_layernorm": "pre_mlp_layernorm",
        "self_attn.o_proj": "self_attention.linear_proj", "self_attn.q_norm": "self_attention.q_layernorm",
        "self_attn.k_norm": "self_attention.k_layernorm", "self_attn.q_proj": "self_attention.linear_q_proj",
        "self_attn.q_a_proj": "self_attention.linear_q_down_proj",
        "self_attn.q_b_proj": "self_attention.linear_q_up_proj",
        "self_attn.kv_a_proj_with_mqa": "self_attention.linear_kv_down_proj",
        "self_attn.kv_b_proj": "self_attention.linear_kv_up_proj",
        "self_attn.q_a_layernorm": "self_attention.q_layernorm",
        "self_attn.kv_a_layernorm": "self_attention.kv_layernorm", "mlp.gate": "mlp.router",
        "mlp.down_proj": "mlp.linear_fc2", "mlp.shared_experts.down_proj": "mlp.shared_experts.linear_fc2",
    }  # fmt: skip
    if geometry.latent is None:
        q, k, v = (take.pop(f"self_attn.{one}_proj.weight") for one in "qkv")
        groups, width = geometry.num_query_groups, geometry.hidden_size
        parts = [tensor.view(groups, -1, width) for tensor in (q, k, v)]
        found["self_attention.linear_qkv.weight"] = torch.cat(parts, 1).reshape(-1, width)
    for theirs, here in pairs.items():
        if theirs + ".weight" in take:
            found[here + ".weight"] = take.pop(theirs + ".weight")
    for theirs, here in (("mlp.", "mlp."), ("mlp.shared_experts.", "mlp.shared_experts.")):
        if theirs + "gate_proj.weight" in take:
            both = [take.pop(f"{theirs}{one}_proj.weight") for one in ("gate", "up")]
            found[here + "linear_fc1.weight"] = torch.cat(both)
    if "mlp.gate.e_score_correction_bias" in take:
        found["mlp.router.expert_bias"] = take.pop("mlp.gate.e_score_correction_bias")
    for theirs, here in (("gate_up_proj", "linear_fc1"), ("down_proj", "linear_fc2")):
        if f"mlp.experts.{theirs}" in take:
            for number, matrix in enumerate(take.pop(f"mlp.experts.{theirs}")):
                found[f"mlp.experts.local_experts.{number}.{here}.weight"] = matrix
    return found


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank stands in tensor parallelism, of layers and of experts."""

    tp: int
    tp_rank: int
    etp: int
    etp_rank: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one rank found."""

    place: Place
    loss: float
    """Mean over the unmasked tokens of the whole batch; 0 on other stages than the last."""
    gradients: dict[str, torch.Tensor]
    logits: torch.Tensor | None
    """`[SAMPLES, LENGTH, V]` of one process without parallelism."""
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    balance: float | None = None
    z_loss: float | None = None
    loads: Mapping[int, ExpertLoad] = field(default_factory=dict[int, ExpertLoad])
    kept: list[float] = field(default_factory=list[float])
    """Share of the choices that fitted into the capacity, by layer with experts."""
    expert_names: tuple[str, ...] = ()
    """Names whose parameters carry allreduce=False."""


def batch() -> dict[str, torch.Tensor]:
    """SAMPLES sequences, some tokens of which do not count."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(90, (SAMPLES, LENGTH + 1), generator=generator)
    mask = (torch.rand(SAMPLES, LENGTH, generator=generator) > 0.2).float()
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "loss_mask": mask}


def reference_gradients(
    geometry: TransformerGeometry,
    moe: ExpertConfig | None = None,
    *,
    dp: int = 1,
    micro_batch: int = 1,
    parts: int = 1,
) -> tuple[Measured, dict[str, torch.Tensor]]:
    """Loss, gradients and logits of transformers, and the weights for our side; with the router's losses if it has any.

    `dp` ranks run micro-batches of `micro_batch` sequences; with a capacity a rank has one of `parts` of a sequence.
    """
    model, data, moe = reference(geometry), batch(), moe or ExpertConfig()
    experts = geometry.experts
    assert experts is not None
    seen: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    chosen: list[list[int]] = []
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_pre_hook(lambda gate, inputs: seen.append(inputs[0] @ gate.weight.T))
            layer.mlp.experts.register_forward_pre_hook(
                lambda module, inputs: chosen.append(
                    torch.bincount(inputs[1].flatten(), minlength=experts.num_experts).tolist()
                )
            )
        if hasattr(layer.mlp, "experts") and moe.moe_expert_capacity_factor is not None:
            layer.mlp.experts.register_forward_pre_hook(partial(_drop, experts, moe, micro_batch, parts, kept))
    logits = model(input_ids=data["tokens"]).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), data["labels"], reduction="none")
    loss = (losses * data["loss_mask"]).sum() / data["loss_mask"].sum()
    scored = [layer.view(SAMPLES, LENGTH, -1) for layer in seen]
    balance = torch.stack([router_losses.balance(one, experts, dp=dp, micro_batch=micro_batch) for one in scored])
    z_loss = torch.stack([router_losses.z_loss(one) for one in scored])
    (loss + experts.balance_coeff * balance.sum() + moe.moe_z_loss_coeff * z_loss.sum()).backward()
    gradients = {
        name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in model.named_parameters()
    }
    weights = {name: one.detach() for name, one in model.named_parameters()}
    weights |= {name: one for name, one in model.named_buffers() if name.endswith("correction_bias")}
    found = Measured(
        place=Place(tp=1, tp_rank=0, etp=1, etp_rank=0), loss=loss.item(), gradients=ours_of(gradients, geometry),
        logits=logits.detach(), balance=balance.mean().item(), z_loss=z_loss.mean().item(),
        kept=[float(one.float().mean()) for one in kept],
        loads={experts.first_dense_layers + n: _load(counts) for n, counts in enumerate(chosen)},
    )  # fmt: skip
    return found, ours_of(weights, geometry)


def _load(counts: list[int]) -> ExpertLoad:
    """Of the tokens of every expert, none of which is dropped."""
    even = sum(counts) / len(counts)
    return ExpertLoad(
        imbalance=max(counts) / even, least=min(counts) / even, idle=counts.count(0) / len(counts), dropped=0.0
    )


def _drop(
    experts: ExpertGeometry,
    moe: ExpertConfig,
    micro_batch: int,
    parts: int,
    kept: list[torch.Tensor],
    module: Any,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Before transformers' experts: hidden states and, per token, numbers and weights of its experts."""
    hidden, numbers, weights = inputs
    kept.append(router_losses.within_capacity(numbers, weights, experts.num_experts, moe, (micro_batch, LENGTH), parts))
    return hidden, numbers, weights * kept[-1]


def choices(geometry: TransformerGeometry) -> torch.Tensor:
    """How often transformers' last router chooses each expert over the whole batch, `[E]`."""
    model, found = reference(geometry), []
    experts = model.model.layers[-1].mlp.experts
    experts.register_forward_pre_hook(lambda module, inputs: found.append(inputs[1]))
    model(input_ids=batch()["tokens"])
    return torch.bincount(found[0].flatten(), minlength=experts.num_experts).float()
