"""What the configuration says of conversations: values for the chat template, and what counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from loongforge.core.config.dump import to_yaml
from loongforge.core.config.resolve import resolve
from loongforge.core.config.template_arguments import template_arguments
from loongforge.core.errors import ConfigError

MODEL = ["--model-name", "qwen3-0.6b", "--train-iters", "3"]


def test_json_of_the_command_line_survives_the_dump(tmp_path: Path) -> None:
    text = '{"enable_thinking": false, "date_string": "26 Jul 2024"}'
    run = resolve([*MODEL, "--chat-template-kwargs", text, "--data-format", "alpaca", "--history-mask-loss"])
    assert template_arguments(run.tokenizer.chat_template_kwargs) == {
        "enable_thinking": False,
        "date_string": "26 Jul 2024",
    }
    assert (run.data.data_format, run.data.history_mask_loss) == ("alpaca", True)
    (tmp_path / "run.yaml").write_text(to_yaml(run))
    assert resolve(["--config-file", str(tmp_path / "run.yaml")]) == run
    assert template_arguments(None) == {}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--chat-template-kwargs", "enable_thinking=false"], "Give a JSON object such as"),
        (["--chat-template-kwargs", "[1]"], "not a JSON object"),
        (["--chat-template-kwargs", '{"tools": []}'], "tools comes from the data"),
        (["--train-on-prompt", "--history-mask-loss"], "give one of them"),
        (["--data-format", "parquet"], "data_format"),
    ],
)
def test_mistakes_are_said(flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve([*MODEL, *flags])
    assert said in str(caught.value)
