"""Values a chat template reads besides the conversation, as `--chat-template-kwargs` gives them."""

from __future__ import annotations

import json
from typing import Any, cast

_OF_THE_DATA = ("messages", "tools", "documents", "add_generation_prompt")


def template_arguments(text: str | None) -> dict[str, Any]:
    """The values by name; `ValueError` when `text` is no JSON object, or names what a conversation says itself."""
    read: Any = json.loads(text or "{}")
    if not isinstance(read, dict):
        raise ValueError("not a JSON object")
    arguments = cast(dict[str, Any], read)
    taken = [name for name in _OF_THE_DATA if name in arguments]
    if taken:
        raise ValueError(f"{taken[0]} comes from the data")
    return arguments
