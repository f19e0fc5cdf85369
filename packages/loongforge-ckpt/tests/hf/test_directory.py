"""Recognising a directory costs no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loongforge.ckpt.hf.directory import detect, read_config
from loongforge.core.errors import CheckpointError
from loongforge.core.plugins import load


def test_registered_and_light(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    program = (
        "import sys\n"
        "from loongforge.core.plugins import load\n"
        "spec = load('checkpoints', 'hf')\n"
        f"assert spec.detect()({str(tmp_path)!r})\n"
        f"assert spec.read_config()({str(tmp_path)!r}) == {{'model_type': 'qwen3'}}\n"
        "heavy = {'torch', 'numpy', 'safetensors', 'transformers', 'megatron'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=180)


def test_spec_leads_to_the_engine() -> None:
    from loongforge.ckpt.hf.load import load as load_weights
    from loongforge.ckpt.hf.save import save as save_weights

    spec = load("checkpoints", "hf")
    assert spec.load() is load_weights
    assert spec.save() is save_weights


def test_what_is_detected(tmp_path: Path) -> None:
    assert not detect(tmp_path)
    assert not detect(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    assert not detect(tmp_path)
    (tmp_path / "config.json").write_text('{"anything": 1}')
    assert not detect(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    assert detect(tmp_path)


def test_config_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        read_config(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file\. A Hugging Face directory has one"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("3")
    with pytest.raises(CheckpointError, match="a JSON object is expected, found int"):
        read_config(tmp_path)
