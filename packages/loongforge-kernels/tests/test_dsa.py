"""Sparse attention as a whole: its routes agree, with each other and with transformers' models, gradients included."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dsa_inputs import normal
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loongforge.kernels.dsa import ESTIMATED, Attended, Shape, Speeds, dsa, plan
from loongforge.kernels.lightning_indexer import lightning_indexer
from loongforge.kernels.rope import rope
from loongforge.kernels.row_bounds import row_bounds
from loongforge.kernels.testing import ZOO, Rows, assert_close

HEADS, LATENT, ROPE, NOPE, VALUE = 4, 20, 6, 10, 7
NAMES = ("q", "kv", "up", "index q", "index k", "index w")
PACKED = Rows(name="packed", documents=(9, 1, 14), topk=4)


def inputs(
    rows: Rows, heads: int = HEADS, dtype: torch.dtype = torch.float64, width: int = 8
) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves in the order of NAMES, and the rows' bounds."""
    ks, ke = rows.bounds()
    shapes = (
        (len(ks), heads, NOPE + ROPE), (rows.keys, LATENT + ROPE), (heads, NOPE + VALUE, LATENT),
        (len(ks), 3, width), (rows.keys, width), (len(ks), 3),
    )  # fmt: skip
    return [normal(*shape, seed=number, dtype=dtype) for number, shape in enumerate(shapes)], [ks, ke]


def attend(leaves: list[Tensor], bounds: list[Tensor], rows: Rows, **named: Any) -> Attended:
    q, kv, up, *index = leaves
    return dsa(q, kv, up, (index[0], index[1], index[2]), *bounds, topk=rows.topk, scale=0.25, **named)


def gradients(found: Attended, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a loss over the output and the indexer's loss."""
    assert found.kl is not None
    grad = normal(*found.out.shape, seed=9, grad=False).to(found.out.dtype)
    return torch.autograd.grad((found.out * grad).sum() + 3 * found.kl.sum(), leaves)


def agree(one: Attended, other: Attended, leaves: list[Tensor], ratio: float = 1e-12) -> None:
    assert one.kl is not None
    assert other.kl is not None
    assert_close("output", one.out, other.out, ratio)
    assert_close("kl", one.kl, other.kl, ratio)
    for name, mine, theirs in zip(NAMES, gradients(one, leaves), gradients(other, leaves), strict=True):
        assert_close(name, mine, theirs, ratio)


@pytest.mark.parametrize("rows", ZOO[1:], ids=lambda rows: rows.name)  # one token has gradients of 0 to rounding
def test_gather_and_masked_agree(rows: Rows):
    leaves, bounds = inputs(rows)
    one, other = (attend(leaves, bounds, rows, route=route) for route in ("gather", "masked"))
    assert one.indices is not None
    assert torch.equal(one.indices, other.indices)
    agree(one, other, leaves)


@pytest.mark.parametrize("route", ["gather", "masked"])
def test_documents_within_topk_are_causal_attention(route: str):
    rows = Rows(name="short", documents=(7, 1, 9), topk=9)
    leaves, bounds = inputs(rows)
    causal = attend(leaves, bounds, rows, longest=9)
    assert causal.indices is None, "the plan did not choose the causal route"
    agree(causal, attend(leaves, bounds, rows, route=route), leaves)


def test_the_loss_teaches_the_indexer_alone():
    leaves, bounds = inputs(PACKED)
    found = attend(leaves, bounds, PACKED, route="gather")
    from_loss = torch.autograd.grad(found.kl, leaves, retain_graph=True, allow_unused=True)
    assert all(grad is None for grad in from_loss[:3])
    assert all(grad.any() for grad in from_loss[3:])
    from_output = torch.autograd.grad(found.out.sum(), leaves, allow_unused=True)
    assert all(grad is None for grad in from_output[3:])


def test_layers_share_a_choice():
    leaves, bounds = inputs(PACKED)
    first = attend(leaves, bounds, PACKED, route="masked")
    again = attend(leaves, bounds, PACKED, route="gather", indices=first.indices)
    agree(first, again, leaves)
    q, kv, up = leaves[:3]
    call = partial(dsa, q, kv, up, None, *bounds, topk=PACKED.topk, scale=0.25)
    follower = call(indices=first.indices, kl=None)
    assert_close("output", follower.out, first.out, 1e-12)
    assert follower.kl is None
    for wrong in ({"indices": first.indices}, {"kl": None}):
        with pytest.raises(ValueError, match="needs the indices of another layer and kl=None"):
            call(**wrong)


@pytest.mark.parametrize("route", ["gather", "masked"])
def test_fp8_makes_the_choice_and_nothing_else(route: str):
    rows = Rows(name="long", documents=(40, 70), topk=9)
    leaves, bounds = inputs(rows, width=128)
    found = attend(leaves, bounds, rows, route=route, fp8=True)
    chosen = lightning_indexer(*leaves[3:], *bounds, rows.topk, fp8=True).indices
    assert found.indices is not None
    assert torch.equal(found.indices, chosen)
    assert not torch.equal(chosen, lightning_indexer(*leaves[3:], *bounds, rows.topk).indices)
    agree(found, attend(leaves, bounds, rows, route=route, indices=chosen), leaves)


def test_fp8_of_another_width_is_refused():
    leaves, bounds = inputs(PACKED)
    with pytest.raises(ValueError, match="fp8=True rotates rows of 128 numbers, q and k have 8: leave fp8 out"):
        attend(leaves, bounds, PACKED, route="masked", fp8=True)


def test_tensor_parallel_ranks_learn_from_all_heads(monkeypatch: pytest.MonkeyPatch):
    leaves, bounds = inputs(PACKED)
    whole = attend(leaves, bounds, PACKED, route="masked")
    q, kv, up, *index = leaves
    halves = [(q[:, part], kv, up[part], *index) for part in (slice(0, 2), slice(2, 4))]
    targets: list[Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda target, group: targets.append(target.clone()))
    for half in halves:
        attend(list(half), bounds, PACKED, route="gather", tp_group=object())
    monkeypatch.setattr(dist, "all_reduce", lambda target, group: target.add_(targets[1]))
    first = attend(list(halves[0]), bounds, PACKED, route="gather", tp_group=object())
    assert_close("kl", first.kl, whole.kl, 1e-12)
    assert_close("output", first.out, whole.out[:, :2], 1e-12)


@pytest.mark.parametrize("route", ["gather", "masked"])
def test_compiled_and_recomputed_gradients_are_the_same(route: str):
    leaves, bounds = inputs(PACKED, dtype=torch.float32)

    def loss(*leaves: Tensor) -> Tensor:
        found = attend(list(leaves), bounds, PACKED, route=route)
        return found.out.square().sum() + found.kl

    plain = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    for again in (compiled, checkpoint(loss, *leaves, use_reentrant=False)):
        for name, one, other in zip(NAMES, plain, torch.autograd.grad(again, leaves), strict=True):
            assert_close(name, other, one, 1e-6)  # einsum may be cut differently


def released(length: int, **named: Any) -> Shape:
    return Shape(**{"queries": length, "keys": length, "heads": 128, "topk": 2048} | named)


@pytest.mark.parametrize(
    ("length", "named", "route"),
    [
        (2048, {}, "causal"),
        (65536, {"longest": 1500}, "causal"),
        (8192, {}, "masked"),
        (16384, {}, "masked"),
        (32768, {}, "gather"),
        (65536, {}, "gather"),
        (65536, {"longest": 8192}, "masked"),
        (32768, {"heads": 16}, "masked"),  # gathering is bound by memory with few heads
    ],
)
def test_the_plan_of_the_released_shape(length: int, named: dict[str, Any], route: str):
    chosen = plan(released(length, **named))
    assert chosen.route == route
    if route != "causal":
        assert chosen.route == min(chosen.milliseconds, key=chosen.milliseconds.__getitem__)
        assert "not measured" in chosen.line()


def test_a_plan_by_other_speeds(tmp_path: Path):
    measured = Speeds(
        device="one that gathers well", source="measured", masked_forward=100, masked_backward=100,
        gather_forward=600, gather_backward=400, projection=600, gather_bytes=10, add_bytes=10,
    )  # fmt: skip
    measured.save(tmp_path / "speeds.json")
    loaded = Speeds.load(tmp_path / "speeds.json")
    assert loaded == measured
    assert plan(released(8192), loaded).line().startswith("dsa: gather (least time on one that gathers well, measured;")
    assert plan(released(8192), ESTIMATED).route == "masked"


def test_the_estimate_is_that_of_the_roofline():
    """32K tokens, 128 heads: 171.8 TFLOP at 450 and 350 TFLOP/s under a mask, 63.9 at 330 and 250 over chosen rows."""
    times = plan(released(32768)).milliseconds
    projections = 6e-9 * 32768 * 128 * 256 * 512 / 600
    assert times["masked"] - projections == pytest.approx(425, rel=0.01)
    assert times["gather"] - projections == pytest.approx(54.9 + 183.2, rel=0.01)


def test_causal_where_keys_would_be_left_out_is_refused():
    leaves, bounds = inputs(PACKED)
    with pytest.raises(ValueError, match=r"documents of at most topk=4 keys; .* longest= \(now 24\)"):
        attend(leaves, bounds, PACKED, route="causal")


def tiny(family: str) -> tuple[Any, Any]:
    """transformers' attention of a family with its modeling module, weights random, all sizes different."""
    from importlib import import_module

    names = {"deepseek_v32": "DeepseekV32", "glm_moe_dsa": "GlmMoeDsa"}
    modeling = import_module(f"transformers.models.{family}.modeling_{family}")
    config = getattr(import_module(f"transformers.models.{family}"), f"{names[family]}Config")(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=28, kv_lora_rank=20,
        qk_rope_head_dim=6, qk_nope_head_dim=10, v_head_dim=7, index_n_heads=3, index_head_dim=16, index_topk=5,
        num_hidden_layers=1, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    attention = getattr(modeling, f"{names[family]}Attention")(config, 0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
            if parameter.dim() == 1:
                parameter.add_(1)
    return attention, modeling


def core(attention: Any, modeling: Any, hidden: Tensor, angles: Any, indices: Tensor, route: str) -> Tensor:
    """The same attention with our core between the projections of theirs."""
    length = hidden.shape[1]
    nope, rope = attention.qk_nope_head_dim, attention.qk_rope_head_dim
    q = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden))).view(1, length, -1, nope + rope)
    q = q.transpose(1, 2)
    compressed, k_rope = attention.kv_a_proj_with_mqa(hidden).split([attention.kv_lora_rank, rope], -1)
    q_rope, k_rope = modeling.apply_rotary_pos_emb_interleave(q[..., nope:], k_rope[:, None], *angles)
    kv = torch.cat((attention.kv_a_layernorm(compressed)[0], k_rope[0, 0]), -1)
    up = attention.kv_b_proj.weight.view(q.shape[1], -1, attention.kv_lora_rank)
    q = torch.cat((q[..., :nope], q_rope), -1)[0].transpose(0, 1)
    ks, ke = row_bounds(torch.tensor([0, length]))
    found = dsa(
        q, kv, up, None, ks, ke, topk=indices.shape[1], scale=attention.scaling, indices=indices, route=route, kl=None
    )
    return attention.o_proj(found.out.reshape(1, length, -1))


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
@pytest.mark.parametrize("route", ["gather", "masked"])
def test_the_core_is_that_of_transformers(family: str, route: str, monkeypatch: pytest.MonkeyPatch):
    attention, modeling = tiny(family)
    length = 13
    hidden = normal(1, length, 48, seed=1)
    angle = normal(1, length, 3, seed=2, grad=False).repeat(1, 1, 2)
    angles = (angle.cos(), angle.sin())
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    mask = torch.zeros(1, 1, length, length).masked_fill(future, float("-inf"))
    chosen: list[Tensor] = []
    attention.indexer.register_forward_hook(lambda module, given, output: chosen.append(output))
    theirs = attention(hidden, angles, mask, position_ids=torch.arange(length)[None])[0]
    indices = chosen[0][0]
    indices = indices.where(
        indices <= torch.arange(length)[:, None], -1
    ).int()  # theirs fill short rows with the future
    ours = core(attention, modeling, hidden, angles, indices, route)
    assert_close("output", ours, theirs, 1e-6)
    learned = {name: p for name, p in attention.named_parameters() if "indexer" not in name} | {"hidden": hidden}
    grad = normal(*theirs.shape, seed=3, grad=False)
    pairs = (torch.autograd.grad(x, list(learned.values()), grad) for x in (ours, theirs))
    for name, mine, expected in zip(learned, *pairs, strict=True):
        assert_close(name, mine, expected, 2e-6)


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_the_selection_is_that_of_transformers(family):
    """From the weights of its indexer, which rotates half by half in DeepSeek-V3.2 and pair by pair in GLM-5."""
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    prefix = "DeepseekV32" if family == "deepseek_v32" else "GlmMoeDsa"
    heads, width, rotary, length, documents = 6, 20, 8, 31, (19, 12)
    config = getattr(modeling, f"{prefix}Config")(
        hidden_size=48, q_lora_rank=24, index_n_heads=heads, index_head_dim=width, qk_rope_head_dim=rotary, index_topk=7
    )
    torch.manual_seed(0)
    indexer = getattr(modeling, f"{prefix}Indexer")(config, 0)
    torch.nn.init.normal_(indexer.k_norm.weight)
    torch.nn.init.normal_(indexer.k_norm.bias)
    hidden, residual = torch.randn(length, 48), torch.randn(length, 24)
    angle = torch.arange(length)[:, None] * 0.3 ** torch.arange(rotary // 2)  # [S, pairs]
    cos, sin = angle.cos(), angle.sin()
    ks, ke = row_bounds(torch.tensor([0, *documents]).cumsum(0))
    key = torch.arange(length)
    seen = (key >= ks[:, None]) & (key < ke[:, None])
    expected = indexer(hidden[None], residual[None], (cos.repeat(1, 2)[None], sin.repeat(1, 2)[None]), seen[None], None)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        table = cos[:, None, None], sin[:, None, None]
        return rope(x[:, None], *table, family == "glm_moe_dsa")[:, 0]  # [S, B, H, D] is what it takes

    q = rotated(indexer.wq_b(residual).view(length, heads, width))
    k = rotated(indexer.k_norm(indexer.wk(hidden))[:, None])[:, 0]
    w = indexer.weights_proj(hidden) * (heads * width) ** -0.5
    found = lightning_indexer(q, k, w, ks, ke, config.index_topk)
    assert (w < 0).any()
    for t in range(length):
        theirs = [s for s in expected[0, t].tolist() if seen[t, s]]
        assert found.indices[t, : found.length[t]].tolist() == sorted(theirs)
