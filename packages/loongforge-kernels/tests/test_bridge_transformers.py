"""Models of transformers with our attention against the same models with their own: logits and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loongforge.kernels.integrations.transformers import NAME, attention, register
from loongforge.kernels.testing import assert_close

LENGTH, TOPK, VOCAB = 21, 5, 53
SHAPES = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "moe_intermediate_size": 12,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "kv_lora_rank": 12,
    "q_lora_rank": 18, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 7, "index_topk": TOPK,
    "index_head_dim": 16, "index_n_heads": 3, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "deepseek_v32": {"first_k_dense_replace": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "glm_moe_dsa": {"indexer_types": ["full", "shared", "full"], "mlp_layer_types": ["dense", "sparse", "sparse"]},
}
RATIO = 1.5e-6
"""Sums in fp32 in another order: measured 5e-7 at most."""
PADDING = {"left": (slice(0, 6), 1), "right": (slice(15, None), 0)}
"""Which tokens of which row are padding."""


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One model twice, random norms and biases included: with their attention and with ours."""
    transformers = pytest.importorskip("transformers", minversion="5.23")
    register()
    torch.manual_seed(0)
    eager, ours = (
        transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(request.param, **SHAPES, **FAMILIES[request.param]),  # each its own
            attn_implementation=name,
        ).eval()
        for name in ("eager", NAME)
    )
    for parameter in eager.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(eager.state_dict())
    assert (eager.config._attn_implementation, ours.config._attn_implementation) == ("eager", NAME)
    return {"eager": eager, "ours": ours}


def inputs(padding: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCAB, (2, LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    if padding:
        part, row = PADDING[padding]
        mask[row, part] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("padding", ["", *PADDING])
def test_logits_and_gradients_are_theirs(models, padding):
    given = inputs(padding)
    real = given["attention_mask"].bool()
    predicted = real & torch.nn.functional.pad(real, (1, -1), value=True)  # by a token that is real too
    labels = given["input_ids"].masked_fill(~predicted, -100)
    found = {name: model(**given, labels=labels, use_cache=False) for name, model in models.items()}
    assert found["ours"].loss.item() == pytest.approx(found["eager"].loss.item(), rel=1e-6)
    assert_close("logits", found["ours"].logits[real], found["eager"].logits[real], RATIO)
    for model, output in zip(models.values(), found.values(), strict=True):
        model.zero_grad()
        output.loss.backward()
    theirs = dict(models["eager"].named_parameters())
    learned = 0
    for name, parameter in models["ours"].named_parameters():
        want = theirs[name].grad
        assert (parameter.grad is None) == (want is None), name
        if want is not None:
            learned += 1
            assert_close(name, parameter.grad, want, RATIO)
    assert learned > 30  # all but the indexers, which transformers does not train


def test_generation_with_a_cache_is_theirs(models):
    given = inputs("left")
    tokens = [model.generate(**given, max_new_tokens=6, do_sample=False) for model in models.values()]
    assert torch.equal(*tokens)


def test_what_it_cannot_take_is_refused():
    q, k, v = (torch.randn(1, 2, 3, 4) for _ in range(3))
    indices, mask = torch.zeros(1, 3, 1, dtype=torch.int32), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    module = torch.nn.Identity()
    with pytest.raises(ValueError, match="Identity hands over none: deepseek_v32 and glm_moe_dsa do; take 'sdpa'"):
        attention(module, q, k, v, mask, scaling=1.0)
    with pytest.raises(ValueError, match=r"has no dropout: set attention_dropout=0.1 to 0"):
        attention(module, q, k, v, mask, scaling=1.0, indices=indices, dropout=0.1)
    with pytest.raises(ValueError, match=r"takes a boolean mask, True where a key is seen, not torch.float32: hand"):
        attention(module, q, k, v, mask.float(), scaling=1.0, indices=indices)
