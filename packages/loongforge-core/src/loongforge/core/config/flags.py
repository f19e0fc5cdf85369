"""The flags that are accepted, as one table: every field of the run under its own name, and Megatron's other spellings.

Every flag of megatron-core's own parser is either here or in `flags_refused`, with a reason; a test compares both with
the parser in the installed wheel. A flag here writes a field of the run, writes the foundation's geometry, or states
what is already so and is checked against it (`AGREED`). None is read and then forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal, get_args, get_type_hints

from loongforge.core.config.run import ComponentConfig, RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One accepted flag, named without its leading dashes."""

    name: str
    path: str
    """Dotted field that it writes; empty for `--config-file`, `--model-name` and flags that only state something."""
    takes: Literal["one", "many", "switch"] = "one"
    """One value, one or more, or none (`true` or `false` may follow a switch of a yes/no field)."""
    writes: Any = True
    """What a bare switch writes."""
    values: Mapping[str, str] | None = None
    """Megatron's word for a value, and ours."""
    accepts: tuple[str, ...] = ()
    """Only for flags that state what is already so: the values that are true."""
    alone: bool = False
    """Megatron takes one or more values, and only one makes sense here."""
    refuses: Mapping[str, str] | None = None
    """Megatron's values that are not taken here, each with the reason."""
    because: str = ""
    """Only for flags that state what is already so: why another value is refused; or why there is nothing to decide."""
    needless: bool = False
    """Taken, and the run says that it changes nothing."""


def _switch(name: str, path: str, writes: Any) -> Flag:
    return Flag(name=name, path=path, takes="switch", writes=writes)


ALIASES: tuple[Flag, ...] = (
    _switch("bf16", "train.precision", "bf16"),
    _switch("accumulate-allreduce-grads-in-fp32", "train.grad_reduce_in_fp32", True),
    _switch("grad-reduce-in-bf16", "train.grad_reduce_in_fp32", False),
    _switch("deterministic-mode", "train.deterministic", True),
    _switch("sft", "train.training_phase", "sft"),
    _switch("recompute-activations", "parallel.recompute_granularity", "selective"),
    Flag(name="num-virtual-stages-per-pipeline-rank", path="parallel.virtual_pipeline_model_parallel_size"),
    Flag(name="train-data-path", path="data.data_path", takes="many"),
    _switch("mock-data", "data.source", "mock"),
    _switch("eod-mask-loss", "data.loss_mask_eod", True),
    Flag(name="tokenizer-type", path="tokenizer.tokenizer_type", values={"HuggingFaceTokenizer": "HFTokenizer"}),
    Flag(name="tokenizer-model", path="tokenizer.hf_tokenizer_path"),
    Flag(name="persistent-save-interval", path="checkpoint.save_interval"),
    _switch("freeze-all-layers", "model.foundation.freeze", True),
    _switch("moe-grouped-gemm", "moe.moe_grouped_gemm", True),
    Flag(
        name="moe-token-dispatcher-type",
        path="moe.moe_token_dispatcher_type",
        refuses={"flex": "it needs the kernels of DeepEP or HybridEP, which no platform here has"},
    ),
)
"""Flags of megatron-core whose name is not the field's, or whose values are spelled otherwise."""

OWN: tuple[Flag, ...] = (
    Flag(name="config-file", path=""),
    Flag(name="model-name", path=""),
    _switch("fp32", "train.precision", "fp32"),
    Flag(name="encoder-tensor-model-parallel-size", path="model.image_encoder.tensor_model_parallel_size"),
    _switch("dsa-indexer-warmup", "model.foundation.dsa_indexer_warmup", True),
    _switch("dsa-indexer-fp8", "model.foundation.dsa_indexer_fp8", True),
    Flag(name="dsa-route", path="model.foundation.dsa_route"),
    Flag(name="dsa-speeds", path="model.foundation.dsa_speeds"),
    _switch("use-vlm-dp-balance", "data.balance", "analytic"),
    _switch("use-vit-dp-balance", "data.balance", "analytic"),  # one deal evens out encoder and foundation
)
"""Flags of LoongForge that are neither a field's name nor Megatron's."""

GEOMETRY: tuple[Flag, ...] = (
    *(
        Flag(name=name.replace("_", "-"), path=f"model.foundation.{name}")
        for name in (
            # dense
            *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
            *("vocab_size", "max_position_embeddings", "norm_epsilon", "rotary_base", "init_method_std"),
            *("attention_dropout", "hidden_dropout"),
            # mixture of experts
            *("num_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_router_topk"),
            *("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor"),
            *("moe_router_score_function", "moe_router_bias_update_rate", "rope_scaling_factor"),
            # multi-latent attention and multi-token prediction
            *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
            *("rotary_scaling_factor", "mscale", "mscale_all_dim", "mtp_num_layers", "mtp_loss_scaling_factor"),
            # sparse attention
            *("dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk", "dsa_indexer_loss_coeff"),
            *("dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset"),
        )
    ),
    Flag(name="moe-aux-loss-coeff", path="model.foundation.moe_aux_loss_coeff", takes="many", alone=True),
    Flag(
        name="moe-router-load-balancing-type",
        path="model.foundation.moe_router_load_balancing_type",
        takes="many",
        alone=True,
        refuses={
            "sinkhorn": "its choice is another one than the model's, so its weights would mean something else",
            "quantile_balancing": "its bias is no part of a checkpoint that another trainer reads",
        },
    ),
    Flag(name="mrope-section", path="model.foundation.mrope_section", takes="many"),
    _switch("qk-layernorm", "model.foundation.qk_layernorm", True),
    _switch("add-qkv-bias", "model.foundation.add_qkv_bias", True),
    _switch("multi-latent-attention", "model.foundation.multi_latent_attention", True),
    _switch("moe-router-enable-expert-bias", "model.foundation.moe_router_enable_expert_bias", True),
    _switch("moe-router-pre-softmax", "model.foundation.moe_router_pre_softmax", True),
    _switch("moe-shared-expert-gate", "model.foundation.moe_shared_expert_gate", True),
    _switch("untie-embeddings-and-output-weights", "model.foundation.tie_word_embeddings", False),
)
"""Flags of the model's shape. A family without such a field refuses the flag and names the fields it has."""


def _agreed(because: str, names: str, accepts: tuple[str, ...] = ()) -> tuple[Flag, ...]:
    return tuple(
        Flag(name=name, path="", takes="one" if accepts else "switch", accepts=accepts, because=because)
        for name in names.split()
    )


AGREED: tuple[Flag, ...] = (
    *_agreed("every model here is built on megatron-core", "use-mcore-models"),
    *_agreed("the MLP of every foundation is SwiGLU", "swiglu"),
    *_agreed("the linear layers of every foundation have no bias", "disable-bias-linear"),
    *_agreed("every foundation has RMSNorm", "normalization", ("RMSNorm",)),
    *_agreed("every foundation has rotary positions", "use-rotary-position-embeddings no-position-embedding"),
    *_agreed("every foundation has rotary positions", "position-embedding-type", ("rope",)),
    *_agreed("every foundation has rotary positions over the whole head", "rotary-percent", ("1", "1.0")),
    *_agreed("key/value heads are shared as num_query_groups says", "group-query-attention"),
    *_agreed("the loss is the mean over the unmasked tokens of the global batch", "calculate-per-token-loss"),
    *_agreed("routers compute in fp32", "moe-router-dtype", ("fp32",)),
    *_agreed("AdamW is the optimizer", "optimizer", ("adam",)),
    *_agreed("checkpoints are torch_dist", "ckpt-format", ("torch_dist",)),
    *_agreed("checkpoints are torch_dist", "use-dist-ckpt"),
    *_agreed("SIGTERM always saves and exits", "exit-signal-handler"),
    *_agreed("SIGTERM saves and exits; other signals are left alone", "exit-signal", ("SIGTERM",)),
    *_agreed("the loader makes no attention masks", "no-create-attention-mask-in-dataloader"),
    *_agreed("nothing is sent to a tracker that watch.trackers does not name", "no-one-logger"),
    *_agreed("--profile uses the torch profiler", "use-pytorch-profiler"),
    *_agreed("the platform chooses the attention kernel", "attention-backend", ("auto",)),
    *_agreed(
        "megatron-core's own fusion stays off, the layers bring theirs",
        "no-masked-softmax-fusion no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion "
        "no-persist-layer-norm no-gradient-accumulation-fusion",
    ),
)
"""Flags that state what is always so here: accepted when true, refused with the reason otherwise."""


NEEDLESS: tuple[Flag, ...] = tuple(
    Flag(name=name, path="", takes="switch" if name.endswith("verbose") else "many", because=because, needless=True)
    for because, names in {
        "costs come from the model's geometry, so no step is spent on measuring them": "vlm-dp-balance-warmup-iters",
        "no sequence is longer than seq_length": "dp-balance-max-len-ratio-vlm dp-balance-max-len-ratio-vit",
        "a deal moves nothing between ranks, so every step is dealt": (
            "dp-balance-trigger-threshold-vlm dp-balance-trigger-threshold-vit"
        ),
        "every step of a balanced run tells how even it is": "dp-balance-verbose",
    }.items()
    for name in names.split()
)
"""Flags of LoongForge about something that needs no decision here."""


SPELLED_OUT = ("lora",)
"""Sections whose flags begin with the section's name: `--lora-rank`."""


@cache
def accepted() -> Mapping[str, Flag]:
    """Every accepted flag by name."""
    table = {flag.name: flag for flag in _of_fields(RunConfig, "")}
    special = {flag.name: flag for flag in (*ALIASES, *OWN, *GEOMETRY, *AGREED, *NEEDLESS)}
    return {**table, **special}


def is_component(hint: Any) -> bool:
    """Whether a field of this type holds a component of the model, present or not."""
    return hint is ComponentConfig or ComponentConfig in get_args(hint)


def flag_name(path: str) -> str:
    """The flag of a field: its name, after the section's where the name alone would say little."""
    section, _, name = path.rpartition(".")
    return (f"{section}-{name}" if section in SPELLED_OUT else name).replace("_", "-")


def _of_fields(section: type, prefix: str) -> list[Flag]:
    """A flag for every field below `section`; yes/no fields have a `--no-` form too."""
    hints = get_type_hints(section)
    found: list[Flag] = []
    for field in fields(section):
        kind: Any = hints[field.name]
        path = f"{prefix}{field.name}"
        name = flag_name(path)
        if is_component(kind):
            continue
        if isinstance(kind, type) and is_dataclass(kind):
            found += _of_fields(kind, f"{path}.")
        elif kind is bool:
            found.append(_switch(name, path, True))
            if not name.startswith("no-"):
                found.append(_switch(f"no-{name}", path, False))
        else:
            found.append(Flag(name=name, path=path, takes="many" if kind == tuple[str, ...] else "one"))
    return found
