"""megatron-core's sparse attention with our backend against the same without: its own module, its own dispatch."""

from __future__ import annotations

from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from dsa_inputs import normal
from torch import Tensor

from loongforge.kernels.dsa import dsa as composed
from loongforge.kernels.integrations import megatron as bridge
from loongforge.kernels.peers.megatron import sparse_attention
from loongforge.kernels.row_bounds import row_bounds
from loongforge.kernels.testing import assert_close

VARIANT = "megatron.core.transformer.experimental_attention_variant"
LENGTH, BATCH, HEADS, LATENT, ROPE, VALUE, TOPK = 19, 2, 3, 12, 8, 7, 5
INDEX_HEADS = 12
"""So many that no two keys have the score 0, where megatron-core leaves to torch which of them it takes."""
RATIO = 2e-6
"""Sums in fp32 in another order: measured 7.5e-7 at most."""


class Alone:
    """A process group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.fixture
def dsa(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """megatron-core's module with our backend registered until the test ends."""
    module = pytest.importorskip(f"{VARIANT}.dsa", exc_type=ImportError)
    utils = pytest.importorskip("megatron.core.utils")
    monkeypatch.setattr(module.dsa_kernels, "_BACKEND_MODULE_NAME_BY_BACKEND", dict(backends(module)))
    monkeypatch.setattr(utils, "_VALID_DSA_KERNEL_BACKENDS", utils._VALID_DSA_KERNEL_BACKENDS)
    bridge.register()
    return module


def backends(dsa: ModuleType) -> dict[str, str]:
    return dsa.dsa_kernels._BACKEND_MODULE_NAME_BY_BACKEND


def layer(dsa: ModuleType, backend: str, index: tuple[Tensor, ...], **settings: Any) -> Any:
    """megatron-core's attention around given indexer inputs, without the process groups that its constructor needs."""
    attention = dsa.DSAttention.__new__(dsa.DSAttention)
    torch.nn.Module.__init__(attention)
    config = {
        "dsa_kernel_backend": backend, "attention_backend": "auto", "kv_lora_rank": LATENT, "qk_pos_emb_head_dim": ROPE,
        "sequence_parallel": False, "dsa_indexer_loss_coeff": 0.7, "dsa_indexer_use_sparse_loss": True,
        "calculate_per_token_loss": False, "dsa_indexer_scoring_relu": True, "num_layers": 1,
    } | settings  # fmt: skip
    given = {
        "config": SimpleNamespace(**config), "layer_number": None, "index_topk": TOPK, "index_share": False,
        "skip_topk": False, "softmax_scale": 0.3, "cp_comm_type": "allgather",
        "pg_collection": SimpleNamespace(tp=Alone(), cp=Alone()),
        "indexer": SimpleNamespace(forward_before_topk=lambda *_: index),
    }  # fmt: skip
    for name, value in given.items():
        object.__setattr__(attention, name, value)
    return attention


def tensors(absorbed: bool, batch: int = BATCH) -> dict[str, Tensor]:
    """Attention's inputs and the indexer's; weights of both signs."""
    width = LATENT + ROPE
    shapes = {
        "query": (LENGTH, batch, HEADS, width), "key": (LENGTH, batch, 1 if absorbed else HEADS, width),
        "value": (LENGTH, batch, HEADS, VALUE), "up": (HEADS, VALUE, LATENT),
        "q": (LENGTH, batch, INDEX_HEADS, 16), "k": (LENGTH, batch, 16), "w": (LENGTH, batch, INDEX_HEADS),
    }  # fmt: skip
    del shapes["value" if absorbed else "up"]
    return {name: normal(*shape, seed=number) for number, (name, shape) in enumerate(shapes.items())}


def run(dsa: ModuleType, backend: str, x: dict[str, Tensor], packed: Any = None, **settings: Any) -> dict[str, Tensor]:
    """Output and every gradient, the indexer's included."""
    attention = layer(dsa, backend, (x["q"], x["k"], x["w"]), **settings)
    hidden = torch.zeros(LENGTH, x["query"].size(1), 3)
    output = attention(
        x["query"], x["key"], x.get("value"), None, hidden, hidden, attn_mask_type=dsa.AttnMaskType.causal,
        packed_seq_params=packed, up_v_weight=x.get("up"),
    )  # fmt: skip
    grad = normal(*output.shape, seed=9, grad=False)
    names = [name for name in x if settings.get("dsa_indexer_loss_coeff", 1) or name not in "qkw"]
    return {"output": output} | dict(zip(names, torch.autograd.grad(output, [x[n] for n in names], grad), strict=True))


def assert_same(dsa: ModuleType, x: dict[str, Tensor], packed: Any = None, **settings: Any) -> None:
    want, have = (run(dsa, backend, x, packed, **settings) for backend in ("none", bridge.NAME))
    for name in want:
        assert_close(name, have[name], want[name], RATIO)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[bool]]:
    """Which of our functions megatron-core called, and whether each call was answered."""
    seen: dict[str, list[bool]] = {}
    for name in [name for name in vars(bridge) if name.startswith("run_fused")]:

        def call(name: str, own: Any, *given: Any, **named: Any) -> Any:
            result = own(*given, **named)
            seen.setdefault(name, []).append(result is not None)
            return result

        monkeypatch.setattr(bridge, name, partial(call, name, getattr(bridge, name)))
    return seen


@pytest.mark.parametrize(
    "settings",
    [{}, {"calculate_per_token_loss": True, "dsa_indexer_scoring_relu": False}, {"dsa_indexer_loss_coeff": 0.0}],
    ids=["mean", "per token, linear", "no loss"],
)
def test_absorbed_attention(dsa, answers, settings):
    assert_same(dsa, tensors(True), **settings)
    assert answers == {"run_fused_dsa_attention": [True]}


def test_keys_of_every_head(dsa, answers):
    assert_same(dsa, tensors(False), dsa_indexer_loss_coeff=0.0)
    assert answers == {"run_fused_dsa_attention": [True]}


def test_packed_documents_with_rows_that_do_not_count(dsa, answers):
    ends = torch.tensor([0, 11, LENGTH], dtype=torch.int32)
    real = torch.ones(1, LENGTH, dtype=torch.bool)
    real[0, 8:11] = False
    packed = SimpleNamespace(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, cu_seqlens_q_padded=ends, cu_seqlens_kv_padded=ends,
        max_seqlen_q=11, max_seqlen_kv=11, real_token_mask_q=real,
    )  # fmt: skip
    assert_same(dsa, tensors(True, batch=1), packed)
    assert answers == {"run_fused_dsa_attention": [True]}


def test_what_it_leaves_to_megatron(dsa, answers):
    assert_same(dsa, tensors(True), dsa_indexer_use_sparse_loss=False)
    assert answers == {"run_fused_dsa_attention": [False], "run_fused_absorbed_sparse_attention": [True]}
    answers.clear()
    assert_same(dsa, tensors(False))
    assert answers == {"run_fused_dsa_attention": [False], "run_fused_qk_topk_with_loss": [False]}


@pytest.mark.parametrize("coefficient", [0.7, 0.0], ids=["loss", "no loss"])
def test_layers_that_share_a_choice(dsa, answers, coefficient):
    """The first chooses, the second takes it over: megatron-core then asks for each step by itself."""
    x, found = tensors(True), []
    for backend in ("none", bridge.NAME):
        layers = [layer(dsa, backend, (x["q"], x["k"], x["w"]), dsa_indexer_loss_coeff=coefficient) for _ in range(2)]
        for number, one in enumerate(layers):
            one.index_share, one.source_layer, one.skip_topk = True, None, number == 1
        hidden, params = torch.zeros(LENGTH, BATCH, 3), SimpleNamespace()
        outputs = [
            one(
                x["query"] * (number + 1), x["key"], None, params, hidden, hidden, up_v_weight=x["up"],
                attn_mask_type=dsa.AttnMaskType.causal,
            )
            for number, one in enumerate(layers)
        ]  # fmt: skip
        names = ["query", "key", "up", *("qkw" if coefficient else "")]
        grads = [normal(*output.shape, seed=8 + number, grad=False) for number, output in enumerate(outputs)]
        found.append([*outputs, *torch.autograd.grad(outputs, [x[name] for name in names], grads)])
    for number, (want, have) in enumerate(zip(*found, strict=True)):
        assert_close(str(number), have, want, RATIO)
    chooser = "run_fused_qk_topk_with_loss" if coefficient else "run_fused_qk_topk"
    assert answers == {chooser: [True], "run_fused_absorbed_sparse_attention": [True, True]}


def test_a_length_for_each_row(dsa):
    x, ends = tensors(True), torch.arange(1, LENGTH + 1, dtype=torch.int32)
    config = layer(dsa, bridge.NAME, ()).config
    index = x["q"], x["k"], x["w"]
    indices, _ = dsa.dsa_kernels.run_fused_qk_topk(config, *index, TOPK, ends * 0, ends, block_size=1)
    length = torch.full(indices.shape[:2], 2)
    cut = indices.masked_fill(torch.arange(TOPK) >= 2, -1)
    attend = dsa.dsa_kernels.run_fused_absorbed_sparse_attention
    whole = attend(config, x["query"], x["key"], indices, 0.3, LATENT, topk_length=length)
    assert torch.equal(whole, attend(config, x["query"], x["key"], cut, 0.3, LATENT))


def test_registration_is_needed_possible_once_more_and_guarded(dsa, monkeypatch):
    """Remove the bridge's private names when megatron-core has a way to register a backend."""
    bridge.register()
    assert backends(dsa)[bridge.NAME] == bridge.__name__
    assert not [name for name in vars(dsa.dsa_kernels) if "register" in name]
    from megatron.core import utils

    assert utils._VALID_DSA_KERNEL_BACKENDS.count(bridge.NAME) == 1
    with pytest.raises(ValueError, match="dsa_kernel_backend=loongforge requires a CUDA device"):
        utils._validate_dsa_kernel_backend_dependencies(bridge.NAME)
    with pytest.raises(ValueError, match="must be one of: none, tilelang, cudnn, loongforge"):
        utils._validate_dsa_kernel_backend_dependencies("other")
    monkeypatch.delattr(utils, "_VALID_DSA_KERNEL_BACKENDS")
    with pytest.raises(RuntimeError, match=r"megatron-core 0.19.* has no table of DSA backends where 0.19.2 has it"):
        bridge.register()
    monkeypatch.setattr(bridge, "version", lambda name: "0.20.0")
    with pytest.raises(RuntimeError, match=r"0.20.0 keeps its DSA backends in private names, known for 0.19 alone"):
        bridge.register()


@pytest.mark.parametrize("kl", ["mean", "sum", None])
def test_dsa_by_a_backend_of_megatron_core_is_dsa(kl, dsa):
    """Our own backend behind the hooks that TileLang's and cuDNN's answer: arguments are where they belong."""
    shapes = {
        "q": (LENGTH, HEADS, 5 + ROPE), "kv": (LENGTH, LATENT + ROPE), "up": (HEADS, 5 + VALUE, LATENT),
        "iq": (LENGTH, INDEX_HEADS, 16), "ik": (LENGTH, 16), "iw": (LENGTH, INDEX_HEADS),
    }  # fmt: skip
    leaves = [normal(*shape, seed=number, grad=True) for number, shape in enumerate(shapes.values())]
    bounds = row_bounds(torch.tensor([0, 8, LENGTH]))

    def results(attend: Any, **named: Any) -> list[Tensor]:
        q, kv, up, *index = leaves
        found = attend(q, kv, up, tuple(index), *bounds, topk=TOPK, scale=0.3, kl=kl, **named)
        total = found.out.sin().sum() + (0 if kl is None else 0.7 * found.kl)
        grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return [found.out, *grads, found.indices.float(), *([] if kl is None else [found.kl])]

    found, expected = results(partial(sparse_attention, bridge.NAME)), results(composed, route="gather")
    for number, (have, want) in enumerate(zip(found, expected, strict=True)):
        assert_close(str(number), have, want, RATIO)


def test_what_a_backend_has_no_place_for_is_refused():
    given = [torch.zeros(1)] * 3
    with pytest.raises(ValueError, match="no place for route='masked', deterministic=True: take impl='composed'"):
        sparse_attention("tilelang", *given, (), *given[:2], topk=1, scale=1.0, route="masked", deterministic=True)
    with pytest.raises(ValueError, match="no loss 'none'"):
        sparse_attention("tilelang", *given, (), *given[:2], topk=1, scale=1.0, kl="none")
