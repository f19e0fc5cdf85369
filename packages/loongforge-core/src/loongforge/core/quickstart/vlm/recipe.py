"""What is trained and how: every number of the quickstart with images, and the command that a user can repeat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loongforge.core.errors import ConfigError
from loongforge.core.quickstart.vlm.places import VlmPlaces

PATCH, TEMPORAL_PATCH, MERGE = 8, 2, 2
"""Pixels per side of a patch, frames of one, patches per side of the square that becomes one token."""
HEADS = 4
"""Attention heads of the foundation, and groups of keys: the most workers that can share them."""
GLOBAL_BATCH_SIZE = 64
"""Images per optimizer step."""
EVALUATIONS = 5
"""Times the held-out loss is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VlmRecipe:
    """The numbers, chosen by measurement for two CPU cores; the defaults keep the whole below four minutes there."""

    workers: int
    """Processes. They share every layer of the foundation, and the encoder's images."""
    precision: Literal["fp32", "bf16"]
    steps: int = 500
    """Optimizer steps."""
    side: int = 32
    """Pixels per side of an image."""
    vocab_size: int = 320
    """Tokens of the tokenizer at most: 256 bytes, special ones, and what the few words need."""
    seq_length: int = 32
    """Tokens per conversation, those of its image included."""
    lr: float = 2e-3
    """Peak learning rate."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"--steps must be at least 1, got {self.steps!r}.")
        if self.workers < 1 or HEADS % self.workers:
            raise ConfigError(
                f"--nproc-per-node must divide the {HEADS} attention heads of the model, got {self.workers!r}."
            )

    @staticmethod
    def most_workers(devices: int) -> int:
        """The most workers of at most `devices` that share the heads evenly; 1 at least."""
        return max(count for count in range(1, max(1, devices) + 1) if HEADS % count == 0)

    @property
    def area(self) -> int:
        """Pixels of an image."""
        return self.side**2

    def held_out_batches(self, images: int) -> int:
        """Whole batches of evaluation among `images`; 1 at least."""
        return max(1, images // GLOBAL_BATCH_SIZE)

    def model_yaml(self, vocab_size: int) -> str:
        """A run file with the geometry of the model: Qwen3-VL in every detail but its size."""
        return MODEL.format(
            vocab_size=vocab_size,
            patch=PATCH,
            temporal=TEMPORAL_PATCH,
            merge=MERGE,
            positions=(self.side // PATCH) ** 2,
            heads=HEADS,
        )

    def train(self, places: VlmPlaces, held_out_batches: int) -> list[str]:
        """`loongforge train` arguments that train fresh weights on the shards and export the result."""
        steps = self.steps
        return [
            *("--config-file", str(places.model_yaml)),
            *("--hf-tokenizer-path", str(places.tokenizer)),
            *("--training-phase", "sft"),
            *("--data-path", str(places.shards / "train"), "--valid-data-path", str(places.shards / "valid")),
            *("--min-pixels", str(self.area), "--max-pixels", str(self.area), "--packing", "false"),
            *("--seq-length", str(self.seq_length)),
            *("--micro-batch-size", str(GLOBAL_BATCH_SIZE), "--global-batch-size", str(GLOBAL_BATCH_SIZE)),
            *("--train-iters", str(steps)),
            *("--eval-iters", str(held_out_batches), "--eval-interval", str(-(-steps // EVALUATIONS))),
            *("--log-interval", str(max(1, steps // 10))),
            *("--lr", f"{self.lr:g}", "--lr-decay-style", "cosine", "--lr-warmup-iters", str(steps // 20)),
            *("--adam-beta2", "0.95", "--weight-decay", "0.1"),
            *("--nproc-per-node", str(self.workers), f"--{self.precision}", "--num-workers", "1"),
            *("--save", str(places.train), "--save-hf", "true", "--save-hf-path", str(places.model)),
            *("--tensor-model-parallel-size", str(self.workers)),
            "+model.image_encoder.tensor-model-parallel-size=1",
        ]


MODEL = """\
# A Qwen3-VL of 0.4 million parameters: what learns to read digits in a minute of two CPU cores. Use it like any
# other run file:  loongforge train --config-file model.yaml --data-path ... --train-iters ...
model:
  model_type: qwen3_vl
  image_encoder:
    family: qwen3_vit
    num_layers: 2
    hidden_size: 64
    ffn_hidden_size: 128
    num_attention_heads: 4
    patch_size: {patch}
    temporal_patch_size: {temporal}
    spatial_merge_size: {merge}
    position_embeddings: {positions}
    deepstack_layers: [0]
  image_projector:
    family: qwen_mlp_adapter
    input_size: null    # as the encoder's width
    output_size: null   # as the foundation's
  foundation:
    family: qwen3
    num_layers: 2
    hidden_size: 64
    ffn_hidden_size: 176
    num_attention_heads: {heads}
    num_query_groups: {heads}
    kv_channels: 16
    vocab_size: {vocab_size}
    max_position_embeddings: 256
    rotary_base: 10000.0
    mrope_section: [4, 2, 2]
    mrope_interleaved: true
    tie_word_embeddings: false
    eos_token_id: [0, 2]   # <|endoftext|> and <|im_end|>
    pad_token_id: 0
"""
"""`model.yaml`."""
