"""DeepSeek-V3.2: the numbers of DeepSeek-V3, and an indexer; released in fp8."""

from __future__ import annotations

from typing import Any

from released.deepseek3 import DEEPSEEK_V3

DEEPSEEK_V3_2: dict[str, Any] = {
    **DEEPSEEK_V3,
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "model_type": "deepseek_v32",
    "quantization_config": {**DEEPSEEK_V3["quantization_config"], "scale_fmt": "ue8m0"},
}
del DEEPSEEK_V3_2["auto_map"]

RELEASED = {"deepseek_v3_2": DEEPSEEK_V3_2}

PARAMETERS = {"deepseek_v3_2": 671_877_929_216}
EXPECTED = {"num_nextn_predict_layers": 0}
FREE = {"quantization_config"}
