"""Several components with ranks of their own, and experts spread over ranks: every tensor once, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from loongforge.ckpt.hf.load import load
from loongforge.ckpt.hf.save import save
from loongforge.core.checkpoint.contract import WeightMove, WeightPart
from loongforge.core.errors import CheckpointError
from loongforge.core.model.weights import Copy, FuseGateUp, SplitQKV, StackedExperts, WeightTable

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

LAYERS, HIDDEN, FFN, EXPERTS = 2, 6, 8, 4
HEADS, WIDTH, PATCH = 4, 3, (2, 1, 5, 5)
MLP, HF_MLP = "decoder.layers.{layer}.mlp.", "layers.{layer}.mlp."
FC1, FC2 = (
    MLP + "experts.local_experts.{expert}.linear_fc1.weight",
    MLP + "experts.local_experts.{expert}.linear_fc2.weight",
)

STACKED = (
    StackedExperts(megatron=FC1, hf=HF_MLP + "experts.gate_up_proj", transposed=False, gate_up=True),
    StackedExperts(megatron=FC2, hf=HF_MLP + "experts.down_proj", transposed=False, shard_dim=1),
)
TURNED = (
    StackedExperts(megatron=FC1, hf=HF_MLP + "experts.gate_up_proj", transposed=True, gate_up=True),
    StackedExperts(megatron=FC2, hf=HF_MLP + "experts.down_proj", transposed=True, shard_dim=1),
)
SINGLE = (
    FuseGateUp(megatron=FC1, gate=HF_MLP + "experts.{expert}.gate_proj", up=HF_MLP + "experts.{expert}.up_proj"),
    Copy(megatron=FC2, hf=HF_MLP + "experts.{expert}.down_proj", shard_dim=1),
)
RULES = {"stacked": STACKED, "turned": TURNED, "single": SINGLE}


def foundation_table(kind: str) -> WeightTable:
    router = (
        Copy(megatron=MLP + "router.weight", hf=HF_MLP + "gate.weight"),
        Copy(megatron=MLP + "router.expert_bias", hf=HF_MLP + "gate.bias"),
        Copy(megatron=MLP + "shared_experts.linear_fc2.weight", hf=HF_MLP + "shared.down_proj", shard_dim=1),
    )
    return WeightTable(rules=(*router, *RULES[kind]))


ENCODER = WeightTable(
    rules=(
        Copy(megatron="patch.weight", hf="visual.patch.weight"),
        SplitQKV(
            megatron="layers.{layer}.linear_qkv.weight",
            hf="visual.blocks.{layer}.qkv.weight",
            num_attention_heads=HEADS,
            kv_channels=WIDTH,
        ),
        SplitQKV(
            megatron="layers.{layer}.linear_qkv.bias",
            hf="visual.blocks.{layer}.qkv.bias",
            num_attention_heads=HEADS,
            kv_channels=WIDTH,
        ),
    ),
    ignored_hf=(r"visual\.rotary\..*",),
)
PROJECTOR = WeightTable(rules=(Copy(megatron="levels.{level}.weight", hf="visual.merger_list.{level}.weight"),))


def tensors_of_whole(kind: str) -> dict[str, torch.Tensor]:
    """Every number of the whole directory is different from every other."""
    shapes: dict[str, tuple[int, ...]] = {"visual.patch.weight": (HIDDEN, *PATCH)}
    for layer in range(LAYERS):
        mlp = HF_MLP.format(layer=layer)
        shapes |= {mlp + "gate.weight": (EXPERTS, HIDDEN), mlp + "gate.bias": (EXPERTS,)}
        shapes |= {mlp + "shared.down_proj": (HIDDEN, 4)}
        if kind == "single":
            for expert in range(EXPERTS):
                names = {f"{mlp}experts.{expert}.{name}_proj": (FFN, HIDDEN) for name in ("gate", "up")}
                shapes |= names | {f"{mlp}experts.{expert}.down_proj": (HIDDEN, FFN)}
        else:
            fc1, fc2 = (2 * FFN, HIDDEN), (HIDDEN, FFN)
            if kind == "turned":
                fc1, fc2 = fc1[::-1], fc2[::-1]
            shapes |= {mlp + "experts.gate_up_proj": (EXPERTS, *fc1), mlp + "experts.down_proj": (EXPERTS, *fc2)}
        block = f"visual.blocks.{layer}.qkv."
        shapes |= {block + "weight": (3 * HEADS * WIDTH, HIDDEN), block + "bias": (3 * HEADS * WIDTH,)}
        shapes |= {f"visual.merger_list.{layer}.weight": (5,)}
    start, found = 0, {}
    for name, shape in shapes.items():
        found[name] = torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
        start += found[name].numel()
    return found


def groups_of(world: Any, ranks: range, sizes: dict[str, int], experts: dict[str, int]) -> Any:
    """Stand-in for a collection over `ranks`, axes fastest first; None where this rank is not among them."""
    if world.rank not in ranks:
        for names in (("tp",), ("dp_cp",), ("pp",), ("ep",), ("expt_tp",), ("expt_dp",), ("expt_tp", "ep")):
            made(world, ranks, experts if names[0] in experts else sizes, names)
        return None
    found = {name: made(world, ranks, sizes, (name,)) for name in ("tp", "dp_cp", "pp")}
    found |= {name: made(world, ranks, experts, (name,)) for name in ("ep", "expt_tp", "expt_dp")}
    return SimpleNamespace(**found, tp_ep=made(world, ranks, experts, ("expt_tp", "ep")))


def made(world: Any, ranks: range, sizes: dict[str, int], names: tuple[str, ...]) -> Any:
    number = torch.tensor(list(ranks)).reshape(*reversed(sizes.values()))
    axes = list(reversed(sizes))
    inner = [axes.index(name) for name in reversed(names)]
    outer = [axis for axis in range(len(axes)) if axis not in inner]
    rows = number.permute(*outer, *inner).reshape(-1, torch.Size(sizes[name] for name in names).numel())
    groups = [(dist.new_group(row.tolist()), row.tolist()) for row in rows]
    return next((group for group, row in groups if world.rank in row), None)


def foundation_of(kit: Any, groups: Any) -> nn.Module:
    model = nn.Module()
    tp, etp, here = groups.tp.size(), groups.expt_tp.size(), EXPERTS // groups.ep.size()
    layers = range(LAYERS) if groups.pp.size() == 1 else range(groups.pp.rank(), groups.pp.rank() + 1)
    for local, layer in enumerate(layers):
        mlp = f"decoder.layers.{local}.mlp."
        kit.put(model, mlp + "router.weight", (EXPERTS, HIDDEN), torch.float32)
        model.get_submodule(mlp + "router").register_buffer("expert_bias", torch.full((EXPERTS,), torch.nan))
        kit.put(model, mlp + "shared_experts.linear_fc2.weight", (HIDDEN, 4 // tp), torch.float32)
        for expert in range(here):
            name = f"{mlp}experts.local_experts.{expert}."
            kit.put(model, name + "linear_fc1.weight", (2 * FFN // etp, HIDDEN), torch.float32)
            kit.put(model, name + "linear_fc2.weight", (HIDDEN, FFN // etp), torch.float32)
        holder: Any = model.get_submodule(mlp + "experts")
        holder.ep_group, holder.num_local_experts = groups.ep, here
        numbered: Any = model.get_submodule(f"decoder.layers.{local}")
        numbered.layer_number = layer + 1
    return model


def encoder_of(kit: Any, groups: Any) -> tuple[nn.Module, nn.Module]:
    encoder, projector = nn.Module(), nn.Module()
    kit.put(encoder, "patch.weight", (HIDDEN, *PATCH), torch.float32)
    rows = 3 * HEADS * WIDTH // groups.tp.size()
    for layer in range(LAYERS):
        kit.put(encoder, f"layers.{layer}.linear_qkv.weight", (rows, HIDDEN), torch.float32)
        kit.put(encoder, f"layers.{layer}.linear_qkv.bias", (rows,), torch.float32)
        kit.put(projector, f"levels.{layer}.weight", (5,), torch.float32)
    return encoder, projector


def parts_of(kit: Any, kind: str, own: Any, other: Any) -> tuple[WeightPart, ...]:
    """Parts of a rank from the groups of the foundation and those of the encoder."""
    encoder, projector = encoder_of(kit, other) if other else (None, None)
    chunks = [foundation_of(kit, own)] if own else []
    return (
        part("image_encoder", [encoder] if encoder else [], ENCODER, other),
        part("image_projector", [projector] if projector else [], PROJECTOR, other),
        part("foundation", chunks, foundation_table(kind), own),
    )


def part(component: str, chunks: list[Any], table: WeightTable, groups: Any) -> WeightPart:
    return WeightPart(component=component, chunks=chunks, table=table, groups=groups)


def move(path: Path, world: Any, parts: tuple[WeightPart, ...], **more: Any) -> WeightMove:
    return WeightMove(path=path, parts=parts, world=world, config={"model_type": "made_up"}, **more)


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "made_up"}')
    save_file(tensors, path / "model.safetensors")
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys(), "one tensor, one file"
        found |= tensors
    return found


LAYOUTS: dict[str, tuple[int, tuple[range, dict[str, int], dict[str, int]], tuple[range, dict[str, int]]]] = {
    # ranks of the job; ranks and sizes of the foundation; ranks and sizes of the encoder
    "one": (
        1, (range(1), {"tp": 1, "dp_cp": 1, "pp": 1}, {"expt_tp": 1, "ep": 1, "expt_dp": 1}), (range(1), {"tp": 1}),
    ),
    "ep4": (
        4, (range(4), {"tp": 2, "dp_cp": 2, "pp": 1}, {"expt_tp": 1, "ep": 4, "expt_dp": 1}), (range(4), {"tp": 1}),
    ),
    "etp2-ep2": (
        4, (range(4), {"tp": 4, "dp_cp": 1, "pp": 1}, {"expt_tp": 2, "ep": 2, "expt_dp": 1}), (range(2), {"tp": 2}),
    ),
    "ep2-twice": (
        4, (range(4), {"tp": 1, "dp_cp": 4, "pp": 1}, {"expt_tp": 1, "ep": 2, "expt_dp": 2}), (range(4), {"tp": 4}),
    ),
    "apart": (
        5, (range(1, 5), {"tp": 1, "dp_cp": 2, "pp": 2}, {"expt_tp": 1, "ep": 2, "expt_dp": 1}), (range(1), {"tp": 1}),
    ),
}  # fmt: skip


def run(kit: Any, layout: str, work: Callable[[Any, Any, Any], Any]) -> list[Any]:
    """`work(world, foundation's groups, encoder's groups)` on every rank."""
    size, (ranks, sizes, experts), (other_ranks, other) = LAYOUTS[layout]

    def on_rank(world: Any) -> Any:
        own = groups_of(world, ranks, sizes, {**experts, "pp": sizes["pp"]})
        rest = len(other_ranks) // other["tp"]
        alone = {"expt_tp": 1, "ep": 1, "expt_dp": len(other_ranks), "pp": 1}
        return work(world, own, groups_of(world, other_ranks, {**other, "dp_cp": rest, "pp": 1}, alone))

    return kit.run_ranks(on_rank, dp=size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", RULES)
def test_every_tensor_once_and_bit_for_bit(kit: Any, tmp_path: Path, layout: str, kind: str) -> None:
    source = write(tmp_path / "source", tensors_of_whole(kind))
    out = tmp_path / "out"

    def work(world: Any, own: Any, other: Any) -> tuple[Any, Any]:
        parts = parts_of(kit, kind, own, other)
        loaded = load(move(source, world, parts))
        tensors = [
            tensor for one in parts for chunk in one.chunks for tensor in (*chunk.parameters(), *chunk.buffers())
        ]
        assert tensors
        assert not any(torch.isnan(tensor).any() for tensor in tensors)
        return loaded, save(move(out, world, parts), 1000)

    told = run(kit, layout, work)
    theirs, ours = read(source), read(out)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    size = sum(tensor.nbytes for tensor in theirs.values())
    for loaded, saved in told:
        assert (loaded.tensors, loaded.bytes) == (saved.tensors, saved.bytes) == (len(theirs), size)


def test_what_lies_where(kit: Any, tmp_path: Path) -> None:
    """Against blocks cut out by hand: expert tensor parallel rank 1 of expert parallel rank 1, encoder rank 1 of 2."""
    tensors = tensors_of_whole("turned")
    source = write(tmp_path / "source", tensors)

    def work(world: Any, own: Any, other: Any) -> dict[str, torch.Tensor]:
        parts = parts_of(kit, "turned", own, other)
        load(move(source, world, parts))
        return {
            name: tensor.detach().clone()
            for one in parts
            for chunk in one.chunks
            for name, tensor in chunk.named_parameters()
        }

    found = run(kit, "etp2-ep2", work)
    stacked, down = tensors["layers.1.mlp.experts.gate_up_proj"], tensors["layers.1.mlp.experts.down_proj"]
    gate, up = stacked[3].T[:FFN], stacked[3].T[FFN:]
    name = "decoder.layers.1.mlp.experts.local_experts.1."
    assert torch.equal(found[3][name + "linear_fc1.weight"], torch.cat([gate[FFN // 2 :], up[FFN // 2 :]]))
    assert torch.equal(found[3][name + "linear_fc2.weight"], down[3].T[:, FFN // 2 :])
    fused = tensors["visual.blocks.1.qkv.weight"].reshape(3, HEADS, WIDTH, HIDDEN).transpose(0, 1)
    assert torch.equal(found[1]["layers.1.linear_qkv.weight"], fused[HEADS // 2 :].reshape(-1, HIDDEN))


def test_stacked_experts_are_read_in_either_order(kit: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "source", tensors_of_whole("turned"))
    out = tmp_path / "out"

    def work(world: Any, own: Any, other: Any) -> None:
        parts = parts_of(kit, "stacked", own, other)
        load(move(source, world, parts))
        save(move(out, world, parts))

    run(kit, "ep4", work)
    ours = read(out)
    for name, tensor in read(source).items():
        assert torch.equal(ours[name], tensor.mT if "experts" in name else tensor), name


def test_part_of_a_whole_leaves_the_rest_alone(kit: Any, tmp_path: Path) -> None:
    tensors = tensors_of_whole("single") | {"visual.rotary.inv_freq": torch.zeros(2)}
    source = write(tmp_path / "source", tensors)

    def work(world: Any, own: Any, other: Any) -> str:
        parts = parts_of(kit, "single", own, other)[:1]
        assert load(move(source, world, parts, whole=False)).tensors == 1 + 2 * LAYERS
        with pytest.raises(CheckpointError) as caught:
            load(move(source, world, parts))
        return str(caught.value)

    text = run(kit, "apart", work)
    assert len(set(text)) == 1
    assert "holds what the model has no place for: 'layers.0.mlp.experts.0.down_proj'" in text[0]
    assert "rotary" not in text[0]


def test_experts_missing_on_one_rank_are_an_error_on_all(kit: Any, tmp_path: Path) -> None:
    tensors = tensors_of_whole("single")
    del tensors["layers.1.mlp.experts.3.up_proj"]
    tensors["layers.0.mlp.experts.2.down_proj"] = torch.zeros(HIDDEN, FFN + 1)
    source = write(tmp_path / "source", tensors)

    def work(world: Any, own: Any, other: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            load(move(source, world, parts_of(kit, "single", own, other)))
        return str(caught.value)

    texts = set(run(kit, "ep4", work))
    assert texts == {
        f"{source}/model.safetensors: 'layers.0.mlp.experts.2.down_proj' has shape [6, 9], the model needs [6, 8].\n"
        f"{source}: lacks what the model needs: 'layers.1.mlp.experts.3.up_proj'."
    }
