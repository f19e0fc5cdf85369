"""What is wrong with a directory: one clear text each, all at once, the same on every rank, and nothing changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loongforge.ckpt.hf.load import load
from loongforge.core.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def copy(make_hf: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def make(tied: bool = False, max_shard_size: str = "5GB") -> Path:
        return Path(shutil.copytree(make_hf(tied, torch.float32, max_shard_size), tmp_path / "source"))

    return make


@pytest.fixture
def error_of(kit: Any) -> Callable[..., str]:
    """The text that every rank raises; asserts that all raise the same and that no parameter changed."""

    def run(path: Path, *, tied: bool = False, **layout: int) -> str:
        def work(world: Any) -> str:
            chunks = kit.chunks_of(world, torch.float32, tied=tied)
            with pytest.raises(CheckpointError) as caught:
                load(kit.move(path, world, chunks, tied=tied))
            assert all(torch.isnan(one).all() for chunk in chunks for one in chunk.parameters())
            return str(caught.value)

        texts = set(kit.run_ranks(work, **layout))
        assert len(texts) == 1, texts
        return texts.pop()

    return run


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_missing_shards(copy: Callable[..., Path], error_of: Callable[..., str]) -> None:
    path = copy(max_shard_size="6KB")
    gone = sorted(path.glob("model-*"))[1:3]
    for file in gone:
        file.unlink()
    text = error_of(path, tp=2)
    assert text.splitlines() == [
        f"{file}: named in model.safetensors.index.json but absent. Download it again." for file in gone
    ]


def test_truncated_shard_on_one_stage(copy: Callable[..., Path], error_of: Callable[..., str]) -> None:
    path = copy(max_shard_size="6KB")
    file = sorted(path.glob("model-*"))[-1]
    file.write_bytes(file.read_bytes()[:-1])
    assert error_of(path, pp=2).startswith(f"{file}: truncated or corrupt (")


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0not json at all!", b"\xff" * 100])
def test_corrupt_single_file(copy: Callable[..., Path], error_of: Callable[..., str], content: bytes) -> None:
    path = copy()
    (path / "model.safetensors").write_bytes(content)
    text = error_of(path)
    assert text.startswith(f"{path}/model.safetensors: truncated or corrupt (")
    assert "\n" not in text


def test_missing_unexpected_shape_and_type_all_at_once(copy: Callable[..., Path], error_of: Callable[..., str]) -> None:
    path = copy()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        del tensors["model.layers.2.self_attn.k_proj.weight"]
        tensors["model.layers.3.self_attn.q_norm.weight"] = torch.zeros(10)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(40, 23)
        tensors["model.layers.2.mlp.down_proj.weight"] = torch.zeros(24, 40, dtype=torch.int8)

    rewrite(path, change)
    lines = error_of(path, pp=2).splitlines()
    file = path / "model.safetensors"
    assert lines == [
        f"{file}: 'model.layers.0.mlp.up_proj.weight' has shape [40, 23], the model needs [40, 24].",
        f"{file}: 'model.layers.2.mlp.down_proj.weight' has type I8, one of F64, F32, F16, BF16 is needed. "
        "Quantised weights cannot be trained; load the original checkpoint.",
        f"{path}: lacks what the model needs: 'model.layers.2.self_attn.k_proj.weight', 'model.norm.weight'.",
        f"{path}: holds what the model has no place for: 'model.layers.3.self_attn.q_norm.weight'. "
        "Does the model's configuration belong to these weights?",
    ]


def test_many_names_are_counted(copy: Callable[..., Path], error_of: Callable[..., str]) -> None:
    path = copy()
    rewrite(path, lambda tensors: tensors.update({f"extra.{number}": torch.zeros(1) for number in range(12)}))
    text = error_of(path, tp=2)
    assert "'extra.7' and 4 more" in text
    assert text.index("'extra.2'") < text.index("'extra.7'")
    assert "extra.10" not in text


def test_index_places_a_tensor_where_it_is_not(copy: Callable[..., Path], error_of: Callable[..., str]) -> None:
    path = copy(max_shard_size="6KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    wrong = next(file for name, file in index["weight_map"].items() if name != "model.norm.weight")
    index["weight_map"]["model.norm.weight"] = wrong
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert error_of(path) == f"{path / wrong}: lacks 'model.norm.weight', which the index places there."


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "a JSON object is expected, found list"),
        ("{}", "no 'weight_map'"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "'../a.safetensors' is not the name of a safetensors file"),
        ('{"weight_map": {"a": "a.bin"}}', "'a.bin' is not the name of a safetensors file"),
    ],
)
def test_bad_index(copy: Callable[..., Path], error_of: Callable[..., str], content: str, text: str) -> None:
    path = copy(max_shard_size="6KB")
    (path / "model.safetensors.index.json").write_text(content)
    assert text in error_of(path)


def test_pickled_weights_are_never_read(copy: Callable[..., Path], error_of: Callable[..., str]) -> None:
    path = copy()
    (path / "model.safetensors").unlink()
    assert error_of(path) == f"{path}: no weights: neither model.safetensors nor model.safetensors.index.json."
    (path / "pytorch_model.bin").write_bytes(b"anything")
    text = error_of(path)
    assert "holds only pickled weights (pytorch_model.bin)" in text
    assert "save_pretrained" in text


def test_absent_directory_and_interrupted_export(error_of: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    assert error_of(path, tp=2) == f"{path}: no such directory."
    (tmp_path / ".nowhere.replaced").mkdir()
    assert f"rename {tmp_path}/.nowhere.replaced to nowhere" in error_of(path)
    path.write_text("a file")
    assert "not a directory" in error_of(path)


def test_tied_head_may_be_stored(kit: Any, copy: Callable[..., Path]) -> None:
    path = copy(tied=True)
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))

    def work(world: Any) -> None:
        load(kit.move(path, world, kit.chunks_of(world, torch.float32, tied=True), tied=True))

    kit.run_ranks(work)


def test_parameter_without_a_rule_and_one_that_does_not_fit(kit: Any, copy: Callable[..., Path]) -> None:
    path = copy()

    def work(world: Any) -> str:
        chunks = kit.chunks_of(world, torch.float32, tied=False)
        kit.put(chunks[0], "decoder.layers.1.mlp.extra.weight", (3,), torch.float32)
        kit.put(chunks[0], "decoder.layers.2.self_attention.linear_qkv.weight", (90, 24), torch.float32)
        with pytest.raises(CheckpointError) as caught:
            load(kit.move(path, world, chunks, tied=False))
        return str(caught.value)

    (text,) = kit.run_ranks(work)
    assert text.splitlines() == [
        "parameter 'decoder.layers.2.self_attention.linear_qkv.weight' does not fit its rule: "
        "90 rows on each of 1 ranks are not 6 + 2 x 2 heads of 10.",
        "'decoder.layers.1.mlp.extra.weight' of the model: no rule in the weight table says where it comes from.",
    ]
