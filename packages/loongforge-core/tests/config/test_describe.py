"""Help and schema: complete, and made from the docstrings of the fields."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loongforge.core.cli import schema
from loongforge.core.config.describe import describe_flags
from loongforge.core.config.flags import accepted
from loongforge.core.errors import ConfigError

pytestmark = pytest.mark.usefixtures("acme")


def test_help_names_every_flag_with_the_docstring_of_its_field() -> None:
    text = " ".join(describe_flags().split())
    for name in accepted():
        if not name.startswith("no-") or name in ("no-load-optim", "no-save-optim"):
            assert f"--{name}" in text.replace("- ", "-"), name
    assert "--lr X Peak learning rate. [0.0001]" in text
    assert "--training-phase pretrain|sft Next-token training on text" in text
    assert "usage: loongforge train" in text
    assert "fp16" not in text, "refused flags are not offered"


def test_schema_holds_sections_families_and_docstrings(acme: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert schema.command([]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["additionalProperties"] is False
    definitions = found["$defs"]
    assert definitions["TrainConfig"]["properties"]["precision"]["enum"] == ["fp32", "bf16"]
    assert definitions["OptimizerConfig"]["properties"]["lr"]["description"] == "Peak learning rate."
    assert {"$ref": "#/$defs/acme-wheel:acme"} in definitions["Foundation"]["anyOf"]
    family = definitions["acme-wheel:acme"]["properties"]
    assert family["family"]["enum"] == ["acme", "acme-wheel:acme"]
    assert family["num_layers"]["description"] == "Layers."
    assert "lr_mult" in family
    assert "geometry" not in family
    assert "ComponentConfig" not in json.dumps(found)


def test_schema_takes_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="takes no arguments, got 'x'"):
        schema.command(["x"])
    assert schema.command(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: loongforge schema")
