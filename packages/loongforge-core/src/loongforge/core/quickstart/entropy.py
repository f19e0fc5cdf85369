"""What a model that knows nothing but how often each token occurs would lose."""

from __future__ import annotations

import numpy as np


def unigram_entropy(trained: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Mean of `-log p` over the tokens `held_out`, in nats per token.

    `p` is the share of each token among `trained`, every count raised by one so that no token has probability 0.
    Both are integers `[tokens]` below `vocab_size`.
    """
    counts = np.bincount(trained, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())
