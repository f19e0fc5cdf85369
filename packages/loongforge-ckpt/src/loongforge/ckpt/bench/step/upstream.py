"""megatron-core as it comes: GPTModel over its own layer specs, its wrapper, its optimizer, its schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from loongforge.ckpt.bench.step.case import CLIP, LEARNING_RATE, WEIGHT_DECAY, Case, Unable
from loongforge.ckpt.bench.step.ours import ALONE
from loongforge.ckpt.bench.step.worker import Step, optimizer_name
from loongforge.core.platform import choose

if TYPE_CHECKING:
    from loongforge.core.plan import Plan


def prepare() -> None:
    """Import what a case needs. On a GPU megatron-core is left as it is; a CPU needs our platform beneath it."""
    platform = choose().platform()
    if platform.device_type == "cpu":
        from loongforge.core.megatron.start import start_megatron

        start_megatron(platform)
    import megatron.core.distributed
    import megatron.core.models.gpt
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel  # noqa: F401


@contextmanager
def defaults(case: Case) -> Iterator[tuple[Step, str]]:
    """TransformerEngine's spec where it is installed, the local one elsewhere."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from loongforge.ckpt.bench.step.drawn import Drawn, fill, with_grouped_names
    from loongforge.core.checkpoint.parts import part_of
    from loongforge.core.megatron.groups import join
    from loongforge.core.plan import Plan

    platform, plan = choose().platform(), Plan.of(case.config, 1)
    with_te = "te" in platform.capabilities()
    if case.documents > 1 and not with_te:
        raise Unable("the attention of megatron-core's local spec takes no packed rows")
    with join(plan.layout, ALONE, platform, 5) as world:
        model_parallel_cuda_manual_seed(case.config.train.seed)
        model = _model(plan, with_te, on_gpu=platform.device_type == "cuda").to(world.device)
        part = part_of(plan, world, [model], None, "foundation")
        drawn = Drawn(seed=case.config.train.seed, device=world.device, disturbed=case.disturbed == "megatron")
        fill(replace(part, table=with_grouped_names(part.table)), drawn)
        wrapped, optimizer = _training(plan, model)
        yield _stepper(plan, wrapped, optimizer, world.device), _about(with_te, optimizer)


def _about(with_te: bool, optimizer: Any) -> str:
    inner = getattr(optimizer, "chained_optimizers", [optimizer])[0].optimizer
    return f"{'transformer_engine' if with_te else 'local'} spec; {optimizer_name(inner)}"


def _model(plan: Plan, with_te: bool, *, on_gpu: bool) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )

    geometry = plan.geometry
    if geometry.latent is not None or geometry.delta is not None or geometry.prediction_layers:
        raise Unable("this side is written for grouped-query attention in every layer")
    options: dict[str, Any] = {"qk_layernorm": geometry.qk_layernorm}
    if geometry.experts is not None:
        options |= {"num_experts": geometry.experts.num_experts, "moe_grouped_gemm": with_te}
    spec = (
        get_gpt_layer_with_transformer_engine_spec(**options)
        if with_te
        else get_gpt_layer_local_spec(normalization="RMSNorm", **options)
    )
    return GPTModel(
        config=_config(plan, with_te, on_gpu=on_gpu),
        transformer_layer_spec=spec,
        vocab_size=plan.padded_vocab_size,
        max_sequence_length=plan.seq_length,
        position_embedding_type="rope",
        rotary_base=int(geometry.rotary_base),
        share_embeddings_and_output_weights=geometry.tie_word_embeddings,
    )


def _config(plan: Plan, with_te: bool, *, on_gpu: bool) -> Any:
    """The fusions that a training script of megatron-core has on wherever what they need is installed."""
    import torch
    import torch.nn.functional as F
    from megatron.core.transformer.transformer_config import TransformerConfig

    geometry, train, parallel = plan.geometry, plan.config.train, plan.config.parallel
    bf16 = train.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    options: dict[str, Any] = {}
    if parallel.recompute_granularity is not None:
        options |= {
            "recompute_granularity": "full",
            "recompute_method": parallel.recompute_method or "uniform",
            "recompute_num_layers": parallel.recompute_num_layers or 1,
        }
    if experts := geometry.experts:
        if experts.shared_ffn_hidden_size or experts.first_dense_layers or experts.score_function != "softmax":
            raise Unable("this side is written for softmax routers without shared experts or dense layers")
        options |= {
            "num_moe_experts": experts.num_experts, "moe_router_topk": experts.topk,
            "moe_ffn_hidden_size": experts.ffn_hidden_size, "moe_router_pre_softmax": not experts.normalise_topk,
            "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0, "moe_router_dtype": "fp32",
            "moe_token_dispatcher_type": "alltoall", "moe_grouped_gemm": with_te, "moe_permute_fusion": with_te,
        }  # fmt: skip
    return TransformerConfig(
        num_layers=geometry.num_layers, hidden_size=geometry.hidden_size, ffn_hidden_size=geometry.ffn_hidden_size,
        num_attention_heads=geometry.num_attention_heads, num_query_groups=geometry.num_query_groups,
        kv_channels=geometry.kv_channels, normalization="RMSNorm", layernorm_epsilon=geometry.norm_epsilon,
        qk_layernorm=geometry.qk_layernorm, add_bias_linear=False, add_qkv_bias=geometry.add_qkv_bias,
        gated_linear_unit=True, activation_func=F.silu, attention_dropout=0.0, hidden_dropout=0.0,
        params_dtype=dtype, pipeline_dtype=dtype, bf16=bf16, perform_initialization=False,
        calculate_per_token_loss=True, bias_activation_fusion=on_gpu, bias_dropout_fusion=on_gpu,
        cross_entropy_loss_fusion=on_gpu, apply_rope_fusion=with_te,
        masked_softmax_fusion=find_spec("scaled_upper_triang_masked_softmax_cuda") is not None,
        gradient_accumulation_fusion=find_spec("fused_weight_gradient_mlp_cuda") is not None, **options,
    )  # fmt: skip


def _training(plan: Plan, model: Any) -> tuple[Any, Any]:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    train = plan.config.train
    bf16, config = train.precision == "bf16", model.config
    bucketing = DistributedDataParallelConfig(grad_reduce_in_fp32=train.grad_reduce_in_fp32)
    wrapped = DistributedDataParallel(config, bucketing, Float16Module(config, model) if bf16 else model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=LEARNING_RATE, min_lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, clip_grad=CLIP,
            bf16=bf16, params_dtype=config.params_dtype,
        ),
        [wrapped],
    )  # fmt: skip
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    return wrapped, optimizer


def _stepper(plan: Plan, wrapped: Any, optimizer: Any, device: Any) -> Step:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func

    run = get_forward_backward_func()

    def forward(batches: Iterator[Any], model: Any) -> tuple[Any, Any]:
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
        packed, ends = None, batch.get("cu_seqlens")
        if ends is not None:
            longest = int(ends.diff().max())
            packed = PackedSeqParams(
                qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
            )
        losses = model(
            batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed,
            loss_mask=batch["loss_mask"],
        )  # fmt: skip

        def counted(output: Any) -> tuple[Any, Any, dict[str, Any]]:
            total, count = (output.float() * batch["loss_mask"]).sum(), batch["loss_mask"].sum().int()
            return total, count, {"loss": total.detach() / count}

        return losses, counted

    def step(batch: Any, number: int) -> tuple[Any, Any]:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        (found,) = run(
            forward_step_func=forward, data_iterator=iter([batch]), model=[wrapped], num_microbatches=1,
            seq_length=plan.seq_length, micro_batch_size=plan.micro_batch_size, forward_only=False,
        )  # fmt: skip
        _, norm, _ = optimizer.step()
        return found["loss"], norm

    return step
