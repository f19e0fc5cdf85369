"""Lengths of samples as training mixes have them: text, images, videos, and captions; packed and dealt as loaded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CAPACITY = 32768
"""Tokens of a pack."""
MIXES = ("sft_mix", "video_heavy", "text_long", "caption")
SHARES = {"sft_mix": (0.35, 0.40, 0.15, 0.10), "video_heavy": (0.20, 0.25, 0.10, 0.45)}
"""Text, one image, several images, video."""
CROSSOVER = 16_800
"""Length at which attention costs as much as all matrices, of a model with 3 B active parameters."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """int64 `[samples]` each."""

    tokens: np.ndarray
    visual: np.ndarray
    """Features among the tokens."""

    def foundation(self) -> np.ndarray:
        """Cost in units of a token's matrices, float64 `[samples]`."""
        return self.tokens + self.tokens.astype(np.float64) ** 2 / CROSSOVER

    def encoder(self) -> np.ndarray:
        """Cost in the same unit, at 28 % of all work: four patches a feature, attention within a frame."""
        patches = 4.0 * self.visual
        cost = patches * (1 + np.minimum(patches, 4096) / 6912)
        return cost * (0.28 / 0.72 * self.foundation().sum() / max(cost.sum(), 1.0))


def draw(mix: str, count: int, generator: np.random.Generator) -> Samples:
    """`count` samples of a mix; lengths are log-normal, as those of public sets nearly are."""

    def lengths(median: float, sigma: float, least: int, most: int) -> np.ndarray:
        drawn = np.exp(np.log(median) + sigma * generator.standard_normal(count))
        return np.clip(drawn, least, most).astype(np.int64)

    none = np.zeros(count, dtype=np.int64)
    if mix == "text_long":
        return Samples(tokens=lengths(1193, 1.03, 16, CAPACITY), visual=none)
    if mix == "caption":
        image = lengths(420, 0.35, 64, 4096)
        return Samples(tokens=image + lengths(80, 0.5, 8, 1000), visual=image)
    kind = generator.choice(4, size=count, p=SHARES[mix])
    text, image, images = lengths(300, 0.8, 8, 8000), lengths(480, 0.7, 16, 16384), lengths(1400, 0.65, 32, 24000)
    video = lengths(2800, 0.9, 128, 24576) if mix == "sft_mix" else lengths(2500, 0.8, 128, 24576)
    visual = np.choose(kind, [none, image, images, video])
    return Samples(tokens=np.minimum(text + visual, CAPACITY), visual=visual)


def load(mix: str, ranks: int, micro_batches: int, seed: int) -> tuple[Samples, np.ndarray]:
    """A step's samples, packed in the order they come, and the rank of each: one pack for each of its micro-batches."""
    slots = ranks * micro_batches
    samples = draw(mix, slots * 90, np.random.default_rng([seed, ranks, micro_batches]))
    pack, space, packs = 0, CAPACITY, []
    for length in samples.tokens.tolist():
        if length > space:
            pack, space = pack + 1, CAPACITY
        space -= length
        packs.append(pack)
    home = np.array(packs)
    kept = home < slots
    return Samples(tokens=samples.tokens[kept], visual=samples.visual[kept]), home[kept] % ranks
