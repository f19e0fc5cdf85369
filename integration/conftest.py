"""What tests across wheels share: one process that has megatron-core up, and tiny real Hugging Face directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Workers are forked from here: no thread pool may be running."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def megatron() -> Any:
    """megatron-core on the platform of LOONGFORGE_PLATFORM and the trainer, imported once for every forked worker."""
    from loongforge.core.megatron.start import preload
    from loongforge.core.platform import choose
    from loongforge.core.testing.tolerance import exact

    platform = choose().platform()
    preload(platform)
    exact()
    return platform


def make_qwen3(path: Path, *, tied: bool, seed: int = 0, vocab_size: int = 131) -> Path:
    """A Qwen3 checkpoint written by transformers: every dimension differs from every other, norms are random."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,  # odd: padded at tensor parallel size 2
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=tied,
        eos_token_id=2,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones would hide a swapped or forgotten norm
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:  # large enough that attention is far from uniform
                parameter.mul_(4)
    model.save_pretrained(path, max_shard_size="100KB")
    return path


@pytest.fixture(scope="session")
def qwen3_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Qwen3 with an output matrix of its own, in several shards."""
    return make_qwen3(tmp_path_factory.mktemp("qwen3-untied"), tied=False)


@pytest.fixture(scope="session")
def qwen3_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Qwen3 whose output matrix is its embedding."""
    return make_qwen3(tmp_path_factory.mktemp("qwen3-tied"), tied=True)
