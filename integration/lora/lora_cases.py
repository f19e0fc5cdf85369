"""Which modules of the zoo's models have adapters, in which layouts, and who is the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from case import EP2, ETP1, LAYOUTS, TP2_SP

ZERO1 = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
RUNS: Mapping[str, tuple[tuple[str, ...], int]] = {
    **LAYOUTS,
    "one-recompute": (("--recompute-granularity", "selective", "--recompute-modules", "mlp"), 1),
    "dp2": ((), 2),
    "dp2-zero1": (ZERO1, 2),
    "dp2-ep2-zero1": ((*ZERO1, *EP2), 2),
    "tp2-sp-etp2": (TP2_SP, 2),
    "tp2-sp-ep2": ((*TP2_SP, *EP2, *ETP1), 2),
}
EXPERTS = ("one", "tp2-sp", "pp2", "ep2", "tp2-sp-ep2")


@dataclass(frozen=True, kw_only=True)
class LoraCase:
    """A model of the zoo with adapters."""

    zoo: str
    """Key of the zoo's `CASES`."""
    targets: tuple[str, ...] = ("all-linear",)
    patterns: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ("one",)
    by_peft: bool = True
    """PEFT is the reference; else W + scale x B A put into the reference model's own parameters by torch."""
    rslora: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """What the run says of its adapters: rank and alpha differ, so that a forgotten scale shows."""
        more = ("--lora-patterns", *self.patterns) if self.patterns else ()
        scale = ("--lora-rslora",) if self.rslora else ()
        return ("--lora-rank", "4", "--lora-alpha", "6", "--lora-target-modules", *self.targets, *more, *scale)


PATTERNS = ("layers.1.*.k_proj rank=3 alpha=9", "o_proj rank=5", "mlp.up_proj alpha=2.5")
LORA: Mapping[str, LoraCase] = {
    "qwen3": LoraCase(
        zoo="qwen3",
        patterns=PATTERNS,
        layouts=("one", "tp2", "tp2-sp", "pp2", "pp2-vpp2", "cp2", "tp2-sp-pp2", "dp2"),
    ),
    # Nothing trains before the layers that are recomputed, or on the first stage.
    "qwen3 mlp": LoraCase(zoo="qwen3", targets=("mlp.*",), layouts=("one-recompute",)),
    "qwen3 last layer": LoraCase(zoo="qwen3", targets=("layers.3.*",), layouts=("pp2",)),
    "qwen2": LoraCase(
        zoo="qwen2_5", targets=("q_proj", "layers.[0-2].*.v_proj", "down_proj"), layouts=("one", "tp2-sp"), rslora=True
    ),
    # One module of query, key and value.
    "qwen": LoraCase(zoo="qwen", by_peft=False, layouts=("tp2-sp",)),
    "internlm2": LoraCase(zoo="internlm2_5", by_peft=False, layouts=("tp2-sp",)),
    "llama": LoraCase(zoo="llama3", targets=("gate_proj", "o_proj"), layouts=("tp2-sp",)),
    "qwen3_moe": LoraCase(
        zoo="qwen3_moe", targets=("all-linear", "mlp.gate"), by_peft=False, layouts=(*EXPERTS, "tp2-sp-etp2")
    ),
    "deepseek_v3": LoraCase(
        zoo="deepseek_v3", targets=("all-linear", "mlp.gate"), by_peft=False, layouts=EXPERTS,
        patterns=("experts.*.down_proj rank=2", "shared_experts.* rank=3 alpha=1"),
    ),
    "deepseek_v3 attention": LoraCase(zoo="deepseek_v3", targets=("self_attn.*",), layouts=("tp2-sp",)),
    "deepseek_v2_lite": LoraCase(zoo="deepseek_v2_lite", by_peft=False, layouts=("tp2-sp",)),
    "glm4_moe": LoraCase(zoo="glm_4_5", by_peft=False, layouts=("tp2-sp-ep2",)),
    "qwen3_next": LoraCase(
        zoo="qwen3_next", targets=("all-linear", "mlp.gate"), by_peft=False, layouts=("one", "tp2-sp")
    ),
    # Further layers: all that the decoder's have, and the projection of both inputs.
    "mimo": LoraCase(
        zoo="mimo", by_peft=False, layouts=("one", "tp2-sp", "pp2"),
        patterns=("mtp_layers.1.* rank=3 alpha=2", "input_proj alpha=5"),
    ),
    "deepseek_v3 predicting": LoraCase(
        zoo="deepseek_v3 predicting", targets=("all-linear", "mlp.gate"), by_peft=False, layouts=("tp2-sp-ep2",)
    ),
    "deepseek_v3 predicting attention": LoraCase(
        zoo="deepseek_v3 predicting", targets=("self_attn.*", "eh_proj"), by_peft=False, layouts=("pp2",)
    ),
    "qwen3_next predicting": LoraCase(
        zoo="qwen3_next predicting", targets=("self_attn.*", "shared_expert.*", "mtp.fc"), by_peft=False,
        layouts=("one",),
    ),
    "minimax_m2": LoraCase(zoo="minimax_m2", by_peft=False, layouts=("ep2",)),
}  # fmt: skip
