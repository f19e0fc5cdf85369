"""The batch that `loongforge verify` shows both sides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from loongforge.ckpt.verify.batch import make_batch


def config(**geometry: Any) -> Any:
    shape = SimpleNamespace(vocab_size=5, **geometry)
    model = SimpleNamespace(foundation=SimpleNamespace(geometry=shape))
    return SimpleNamespace(train=SimpleNamespace(seed=1, seq_length=64), model=model)


def test_the_padding_token_is_not_drawn() -> None:
    batch = make_batch(config(pad_token_id=4), 3)
    assert set(batch["tokens"].flatten().tolist()) == {0, 1, 2, 3}
    assert set(make_batch(config(pad_token_id=None), 3)["tokens"].flatten().tolist()) == {0, 1, 2, 3, 4}
