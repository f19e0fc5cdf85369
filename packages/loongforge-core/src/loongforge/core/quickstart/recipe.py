"""What is trained and how: every number of the quickstart, and the commands that a user can repeat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loongforge.core.errors import ConfigError
from loongforge.core.quickstart.places import Places

SFT_SHARE = 3
"""Fine-tuning takes one step for so many of pre-training."""
GLOBAL_BATCH_SIZE = 4
"""Sequences per optimizer step over all workers."""
EVALUATIONS = 4
"""Times the held-out loss is measured in each training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The numbers, chosen by measurement for two CPU cores; the defaults keep the whole below three minutes there."""

    workers: int
    """Processes, all data parallel."""
    precision: Literal["fp32", "bf16"]
    steps: int = 560
    """Optimizer steps of pre-training."""
    vocab_size: int = 4096
    """Tokens of the tokenizer and of the model."""
    seq_length: int = 256
    """Tokens per sequence."""
    global_batch_size: int = GLOBAL_BATCH_SIZE
    """Sequences per optimizer step over all workers."""
    lr: float = 5e-3
    """Peak learning rate of pre-training."""
    sft_lr: float = 4e-3
    """Peak learning rate of fine-tuning."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"--steps must be at least 1, got {self.steps!r}.")
        if self.workers < 1 or self.global_batch_size % self.workers:
            raise ConfigError(
                f"--nproc-per-node must divide the {self.global_batch_size} sequences of a step, got {self.workers!r}."
            )

    @staticmethod
    def most_workers(devices: int) -> int:
        """The most workers of at most `devices` that share a step's sequences evenly; 1 at least."""
        return max(count for count in range(1, max(1, devices) + 1) if GLOBAL_BATCH_SIZE % count == 0)

    @property
    def sft_steps(self) -> int:
        """Optimizer steps of fine-tuning."""
        return max(1, self.steps // SFT_SHARE)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, and of a batch of evaluation."""
        return self.seq_length * self.global_batch_size

    def held_out_batches(self, tokens: int) -> int:
        """Whole batches of evaluation in a stream of `tokens`, whose first one is not predicted; 1 at least."""
        return max(1, (tokens - 1) // self.tokens_per_step)

    def model_yaml(self, vocab_size: int) -> str:
        """A run file with the geometry of the model: Qwen3 in every detail but its size."""
        return MODEL.format(vocab_size=vocab_size, seq_length=2 * self.seq_length)

    def pretrain(self, places: Places, held_out_batches: int) -> list[str]:
        """`loongforge train` arguments that train fresh weights on the corpus."""
        return [
            *("--config-file", str(places.model_yaml)),
            *("--hf-tokenizer-path", str(places.tokenizer)),
            *self._data(places.corpus),
            *self._length(self.steps, held_out_batches),
            *self._optimizer(self.lr, self.steps),
            *self._layout(),
            *("--save", str(places.pretrain), "--save-hf", "true"),
        ]

    def finetune(self, places: Places, held_out_batches: int) -> list[str]:
        """`loongforge train` arguments that fine-tune the exported directory of pre-training on conversations."""
        return [
            *("--load", str(places.pretrained)),
            *("--training-phase", "sft"),
            *self._data(places.questions),
            *self._length(self.sft_steps, held_out_batches),
            *self._optimizer(self.sft_lr, self.sft_steps),
            *self._layout(),
            *("--save", str(places.finetune), "--save-hf", "true", "--save-hf-path", str(places.model)),
        ]

    def _data(self, folder: object) -> list[str]:
        return ["--data-path", f"{folder}/train.jsonl", "--valid-data-path", f"{folder}/valid.jsonl"]

    def _length(self, steps: int, held_out_batches: int) -> list[str]:
        return [
            *("--seq-length", str(self.seq_length)),
            *("--micro-batch-size", str(self.global_batch_size // self.workers)),
            *("--global-batch-size", str(self.global_batch_size)),
            *("--train-iters", str(steps)),
            *("--eval-iters", str(held_out_batches), "--eval-interval", str(-(-steps // EVALUATIONS))),
            *("--log-interval", str(max(1, steps // 10))),
        ]

    def _optimizer(self, lr: float, steps: int) -> list[str]:
        return [
            *("--lr", f"{lr:g}", "--lr-decay-style", "cosine", "--lr-warmup-iters", str(steps // 20)),
            *("--adam-beta2", "0.95", "--weight-decay", "0.1"),
        ]

    def _layout(self) -> list[str]:
        sharded = ["--use-distributed-optimizer"] if self.workers > 1 else []
        return [
            *("--nproc-per-node", str(self.workers), *sharded),
            *(f"--{self.precision}", "--num-workers", "0"),
        ]


MODEL = """\
# A Qwen3 of 1.6 million parameters: what learns most in a minute of two CPU cores. Use it like any other run file:
#   loongforge train --config-file model.yaml --data-path ... --train-iters ...
model:
  foundation:
    family: qwen3
    num_layers: 3
    hidden_size: 128
    ffn_hidden_size: 352
    num_attention_heads: 4
    num_query_groups: 2
    kv_channels: 32
    vocab_size: {vocab_size}
    max_position_embeddings: {seq_length}
    rotary_base: 10000.0
    tie_word_embeddings: false
    eos_token_id: [0, 2]   # <|endoftext|> and <|im_end|>
    pad_token_id: 0
"""
"""`model.yaml`."""
