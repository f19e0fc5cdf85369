"""A small decoder and runs of it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from loongforge.core.config.experts import ExpertConfig
from loongforge.core.config.run import (
    ComponentConfig,
    ComponentParallel,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
)
from loongforge.core.model.geometry import (
    DeltaGeometry,
    EncoderGeometry,
    ExpertGeometry,
    IndexGeometry,
    LatentGeometry,
    ProjectorGeometry,
    TransformerGeometry,
)

SIZES: dict[str, Any] = {
    "num_layers": 8,
    "hidden_size": 64,
    "ffn_hidden_size": 160,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 16,
    "vocab_size": 131,
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-6,
    "rotary_base": 1e4,
    "tie_word_embeddings": True,
    "qk_layernorm": True,
}

EXPERTS: dict[str, Any] = {"num_experts": 12, "topk": 3, "ffn_hidden_size": 48}
LATENT: dict[str, Any] = {
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
SPARSE = LATENT | {"index": {"heads": 3, "head_dim": 10, "topk": 48}}
TAUGHT = LATENT | {"index": SPARSE["index"] | {"loss_coeff": 0.5}}
GATHERED = LATENT | {"index": SPARSE["index"] | {"route": "gather"}}
WARMED = LATENT | {"index": TAUGHT["index"] | {"warmup": True}}
SHARED = LATENT | {"index": TAUGHT["index"] | {"shared_layers": (1, 3, 4, 5, 7)}}
DELTA: dict[str, Any] = {
    "layers": (0, 1, 2, 4, 5, 6),
    "num_key_heads": 4,
    "num_value_heads": 8,
    "key_head_dim": 12,
    "value_head_dim": 20,
}
AS_LATENT: dict[str, Any] = {"num_query_groups": 8, "kv_channels": 24, "qk_layernorm": False}
ENCODER: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 48,
    "ffn_hidden_size": 72,
    "num_attention_heads": 4,
    "patch_dim": 54,
    "spatial_merge_size": 2,
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-6,
    "gated": False,
    "patch_bias": True,
    "linear_bias": True,
    "position_embeddings": 16,
    "deepstack_layers": (0, 1),
}
PROJECTOR: dict[str, Any] = {
    "input_size": None,
    "output_size": None,
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-6,
}


@dataclass(frozen=True)
class Shape:
    """What a family's config is to the plan."""

    sizes: dict[str, Any] = field(default_factory=dict)

    def geometry(self) -> TransformerGeometry:
        sizes: dict[str, Any] = SIZES | self.sizes
        if experts := sizes.get("experts"):
            sizes["experts"] = ExpertGeometry(**experts)
        if latent := sizes.get("latent"):
            index = IndexGeometry(**latent["index"]) if "index" in latent else None
            sizes = AS_LATENT | sizes | AS_LATENT | {"latent": LatentGeometry(**latent | {"index": index})}
        if delta := sizes.get("delta"):
            sizes["delta"] = DeltaGeometry(**delta)
        return TransformerGeometry(**sizes)


@dataclass(frozen=True)
class Eye:
    """The same of an encoder."""

    sizes: dict[str, Any] = field(default_factory=dict)

    def geometry(self) -> EncoderGeometry:
        return EncoderGeometry(**(ENCODER | self.sizes))


@dataclass(frozen=True)
class Bridge:
    """The same of a projector."""

    sizes: dict[str, Any] = field(default_factory=dict)

    def geometry(self) -> ProjectorGeometry:
        return ProjectorGeometry(**(PROJECTOR | self.sizes))


def sighted(**options: Any) -> RunConfig:
    """A run of the small decoder with an encoder and a projector; `encoder`, `projector` and `foundation` hold fields
    of ComponentConfig, ComponentParallel and the geometry, and all else is as in `run`."""
    shapes: dict[str, Any] = {"encoder": Eye, "projector": Bridge, "foundation": None}
    made: dict[str, Any] = {}
    for name, shape in shapes.items():
        given: dict[str, Any] = dict(options.pop(name, {}))
        own = {key: given.pop(key) for key in ("freeze", "lr_mult") if key in given}
        spread = {key: given.pop(key) for key in list(given) if key in {f.name for f in fields(ComponentParallel)}}
        own["parallel"] = ComponentParallel(**spread)
        if shape is not None:
            own = {"family": f"tiny_{name}", "geometry": shape(given)} | own
        made[name] = own
    text = run(**options)
    model = replace(
        text.model,
        foundation=replace(text.model.foundation, **made["foundation"]),
        image_encoder=ComponentConfig(**made["encoder"]),
        image_projector=ComponentConfig(**made["projector"]),
        model_type="tiny_vl",
    )
    return replace(text, model=model)


def run(**options: Any) -> RunConfig:
    """A run of the small decoder; each option goes to the section that has a field of its name, else to the shape."""
    sections: dict[str, dict[str, Any]] = {
        "parallel": {},
        "train": {"seq_length": 128},
        "optimizer": {},
        "tokenizer": {},
        "moe": {},
    }
    kinds = {
        "parallel": ParallelConfig,
        "train": TrainConfig,
        "optimizer": OptimizerConfig,
        "tokenizer": TokenizerConfig,
        "moe": ExpertConfig,
    }
    if "train_iters" not in options and "train_samples" not in options:
        sections["train"]["train_iters"] = 10
    component = {name: options.pop(name) for name in ("freeze",) if name in options}
    patterns = options.pop("freeze_parameters", ())
    shape: dict[str, Any] = {}
    for name, value in options.items():
        owner = next((section for section, kind in kinds.items() if name in {f.name for f in fields(kind)}), None)
        (sections[owner] if owner else shape)[name] = value
    foundation = ComponentConfig(family="tiny", geometry=Shape(shape), **component)
    made = {name: kinds[name](**values) for name, values in sections.items()}
    return RunConfig(model=ModelConfig(foundation=foundation, freeze_parameters=patterns), **made)
