"""The weights of index heads in bf16: what the product of DeepSeek's release gives, beside what transformers gives."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loongforge.core.model.geometry import IndexGeometry
from loongforge.kernels.testing import error_ratio

HIDDEN, LATENT, HEADS, WIDTH, ROPE = 48, 20, 6, 16, 8
CONFIG = {
    "hidden_size": HIDDEN, "q_lora_rank": LATENT, "index_n_heads": HEADS, "index_head_dim": WIDTH, "index_topk": 5,
    "qk_rope_head_dim": ROPE,
}  # fmt: skip
TINY = CONFIG | {
    "first_k_dense_replace": 1, "head_dim": 8, "intermediate_size": 24, "kv_lora_rank": 12, "num_attention_heads": 2,
    "num_hidden_layers": 1, "num_key_value_heads": 2, "pad_token_id": 0, "qk_nope_head_dim": 4, "v_head_dim": 4,
    "vocab_size": 32,
}  # fmt: skip
FAMILIES = pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])


def weights_of(theirs: Any, x: torch.Tensor) -> torch.Tensor:
    """What the indexer of transformers weighs heads by, with the scores' scale: as its `forward` makes them."""
    seen: list[torch.Tensor] = []
    hook = theirs.weights_proj.register_forward_hook(lambda _, __, output: seen.append(output))
    turns = torch.ones(1, len(x), ROPE, dtype=x.dtype), torch.zeros(1, len(x), ROPE, dtype=x.dtype)
    latent, mask = torch.zeros(1, len(x), LATENT, dtype=x.dtype), torch.ones(1, len(x), len(x), dtype=torch.bool)
    theirs(x.transpose(0, 1), latent, turns, mask, torch.arange(len(x))[None])
    hook.remove()
    return seen[0].float().transpose(0, 1) * (HEADS * WIDTH) ** -0.5


@FAMILIES
def test_heads_are_weighed_in_fp32(family: str, tiny: Any) -> None:
    """From numbers of bf16, as the release stores them. transformers does so where it holds them in fp32."""
    from transformers import AutoConfig
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer
    from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaIndexer

    from loongforge.core.megatron.indexer import Indexer
    from loongforge.core.megatron.layers import Norm

    torch.manual_seed(5)
    made: Any = {"deepseek_v32": DeepseekV32Indexer, "glm_moe_dsa": GlmMoeDsaIndexer}[family]
    theirs = made(AutoConfig.for_model(family, **TINY), 0).to(torch.bfloat16)
    x = torch.randn(7, 1, HIDDEN).bfloat16()
    config = SimpleNamespace(
        hidden_size=HIDDEN, q_lora_rank=LATENT, params_dtype=torch.bfloat16, perform_initialization=False,
        sequence_parallel=False,
    )  # fmt: skip
    index = IndexGeometry(heads=HEADS, head_dim=WIDTH, topk=5)
    ours = Indexer(config, index, partial(Norm), 1)
    ours.linear_weights_proj.weight.data.copy_(theirs.weights_proj.weight)
    found = ours(x, torch.zeros(7, 1, LATENT).bfloat16(), torch.zeros(7, 1, 1, ROPE), 1.0)[2]
    expected = x.double() @ theirs.weights_proj.weight.double().T * (HEADS * WIDTH) ** -0.5
    assert found.dtype == torch.float32
    assert error_ratio(found, expected) < 2e-7  # measured 4e-8
    assert error_ratio(weights_of(theirs, x), expected) > 5e-4  # measured 1.5e-3: the product is rounded to bf16
    theirs.weights_proj.float()
    torch.testing.assert_close(found, weights_of(theirs, x), rtol=0, atol=1e-6)


@FAMILIES
def test_transformers_keeps_no_fp32_matrix_beside_bf16(family: str, tmp_path: Any) -> None:
    """`_keep_in_fp32_modules` means fp16 alone. Should it hold for bf16 too one day, so may ours."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **TINY, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for dtype, kept in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert model.model.layers[0].self_attn.indexer.weights_proj.weight.dtype == kept
