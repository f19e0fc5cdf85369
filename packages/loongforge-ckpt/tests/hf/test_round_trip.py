"""Hugging Face directory -> model chunks -> Hugging Face directory, bit for bit, on every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loongforge.ckpt.hf.directory import read_config
from loongforge.ckpt.hf.load import load
from loongforge.ckpt.hf.save import save

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

LAYOUTS = {
    "one rank": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "pp2 interleaved": {"pp": 2},
    "dp2": {"dp": 2},
    "tp2 pp2": {"tp": 2, "pp": 2},
}
MAX_BYTES = 6_000
"""Small enough that one stage writes several files."""


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        part = load_file(file)
        assert not tensors.keys() & part.keys(), "one tensor, one file"
        tensors |= part
    return tensors


def assert_bitwise(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


CASES = [(layout, tied, torch.float32) for layout in LAYOUTS for tied in (True, False)]
CASES += [(layout, tied, torch.bfloat16) for layout in ("one rank", "tp2") for tied in (True, False)]


@pytest.mark.parametrize(("layout", "tied", "dtype"), CASES)
def test_bitwise_and_readable(
    kit: Any, make_hf: Callable[..., Path], tmp_path: Path, layout: str, tied: bool, dtype: torch.dtype
) -> None:
    source, out = make_hf(tied, dtype), tmp_path / "out"
    config = read_config(source)

    def work(world: Any) -> tuple[Any, Any]:
        chunks = kit.chunks_of(world, dtype, tied=tied, interleaved="interleaved" in layout)
        loaded = load(kit.move(source, world, chunks, tied=tied))
        assert not any(torch.isnan(parameter).any() for chunk in chunks for parameter in chunk.parameters())
        saved = save(kit.move(out, world, chunks, tied=tied, config=config, travel=source), MAX_BYTES)
        return loaded, saved

    told = kit.run_ranks(work, **LAYOUTS[layout])
    theirs = tensors_of(source)
    assert_bitwise(tensors_of(out), theirs)
    size = sum(tensor.nbytes for tensor in theirs.values())
    for loaded, saved in told:
        assert (loaded.tensors, loaded.bytes) == (saved.tensors, saved.bytes) == (len(theirs), size)
    check_directory(out, source, theirs)
    same_answer(source, out)


def check_directory(out: Path, source: Path, theirs: dict[str, torch.Tensor]) -> None:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == theirs.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in theirs.values())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert set(files) == set(index["weight_map"].values())
    for name in ("tokenizer_config.json", "chat_template.jinja", "modeling_tiny.py"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "train.py").exists(), "what is not the model's stays where it is"
    assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing else is left behind"


def same_answer(source: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor([[1, 5, 100, 7]])
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (out, source))
    assert type(ours) is type(theirs)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_parameters_are_what_megatron_expects(kit: Any, make_hf: Callable[..., Path]) -> None:
    source = make_hf(False)
    theirs = tensors_of(source)

    def work(world: Any) -> dict[str, torch.Tensor]:
        chunks = kit.chunks_of(world, torch.float32, tied=False)
        load(kit.move(source, world, chunks, tied=False))
        return {name: parameter.detach().clone() for name, parameter in chunks[0].named_parameters()}

    for rank, mine in enumerate(kit.run_ranks(work, tp=2)):
        hf, ours = "model.layers.1.", "decoder.layers.1."
        q, k, v = (theirs[f"{hf}self_attn.{one}_proj.weight"].chunk(2)[rank] for one in "qkv")
        assert torch.equal(mine[ours + "self_attention.linear_qkv.weight"], torch.cat([q, k, v]))  # one group a rank
        gate, up = (theirs[f"{hf}mlp.{one}_proj.weight"].chunk(2)[rank] for one in ("gate", "up"))
        assert torch.equal(mine[ours + "mlp.linear_fc1.weight"], torch.cat([gate, up]))
        down = theirs[hf + "mlp.down_proj.weight"].chunk(2, 1)[rank]
        assert torch.equal(mine[ours + "mlp.linear_fc2.weight"], down)
        embedding = theirs["model.embed_tokens.weight"]  # 101 tokens: 51 rows a rank, the last one is padding
        rows = embedding[51 * rank : 51 * (rank + 1)]
        assert torch.equal(mine["embedding.word_embeddings.weight"][: len(rows)], rows)
        assert (mine["embedding.word_embeddings.weight"][len(rows) :] == 0).all()


def test_sharded_source_and_one_small_file_out(kit: Any, make_hf: Callable[..., Path], tmp_path: Path) -> None:
    source, out = make_hf(True, torch.float32, "6KB"), tmp_path / "new" / "out"
    assert len(list(source.glob("*.safetensors"))) > 2

    def work(world: Any) -> None:
        chunks = kit.chunks_of(world, torch.bfloat16, tied=True)  # the model's type wins over the file's
        load(kit.move(source, world, chunks, tied=True))
        save(kit.move(out, world, chunks, tied=True, config=read_config(source), dtype=torch.float32))

    kit.run_ranks(work)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    rounded = {name: tensor.bfloat16().float() for name, tensor in tensors_of(source).items()}
    assert_bitwise(tensors_of(out), rounded)


def test_config_says_the_type(kit: Any, make_hf: Callable[..., Path], tmp_path: Path) -> None:
    source, out = make_hf(True), tmp_path / "out"
    config = {key: value for key, value in read_config(source).items() if key != "dtype"}

    def work(world: Any) -> None:
        chunks = kit.chunks_of(world, torch.float32, tied=True)
        load(kit.move(source, world, chunks, tied=True))
        save(kit.move(out, world, chunks, tied=True, config=config, dtype=torch.bfloat16))

    kit.run_ranks(work)
    assert read_config(out) == {**config, "torch_dtype": "bfloat16"}
