"""The route of sparse attention goes by the table that a user measured, and says when a file is none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loongforge.core.errors import ConfigError
from loongforge.core.model.geometry import IndexGeometry, LatentGeometry
from loongforge.core.model.sparse_route import read_speeds, sparse_route
from loongforge.kernels.dsa_costs import ESTIMATED

SLOW_MASK = replace(ESTIMATED, masked_forward=1.0, device="mine", source="measured today")


def latent(**index: object) -> LatentGeometry:
    return LatentGeometry(
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        norm_epsilon=1e-6, index=IndexGeometry(heads=64, head_dim=128, topk=2048, **index),
    )  # fmt: skip


def test_a_measured_table_decides(tmp_path: Path) -> None:
    SLOW_MASK.save(tmp_path / "mine.json")
    row = {"heads": 128, "queries": 8192, "keys": 8192}
    assert sparse_route(latent(), **row).route == "masked"
    found = sparse_route(latent(speeds=read_speeds(str(tmp_path / "mine.json"))), **row)
    assert (found.route, found.reason) == ("gather", "least time on mine, measured today")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        ("{", "Expecting property name"),
        (json.dumps({"device": "x"}), "missing"),
        (json.dumps([1]), "must be a mapping"),
    ],
)
def test_another_file_is_refused(content: str | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "speeds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(
        ConfigError, match=rf"dsa_speeds='.*speeds.json' is no table of speeds \(.*{reason}.*--speeds FILE"
    ):
        read_speeds(str(path))


def test_a_rate_is_above_zero(tmp_path: Path) -> None:
    SLOW_MASK.save(tmp_path / "mine.json")
    (tmp_path / "mine.json").write_text((tmp_path / "mine.json").read_text().replace("330", "-330"))
    with pytest.raises(ConfigError, match="gather_forward is -330, a rate above 0"):
        read_speeds(str(tmp_path / "mine.json"))
