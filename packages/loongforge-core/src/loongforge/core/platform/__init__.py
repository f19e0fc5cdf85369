"""What a device is, and which one this run uses.

`cpu` and `cuda` are built in; other wheels register theirs under `loongforge.platforms`. The choice is made once,
before the first import of megatron-core, because a platform may have to stand in for calls it makes at import.
"""

from __future__ import annotations

from loongforge.core.platform.choose import Choice, choose
from loongforge.core.platform.contract import Memory, Platform

__all__ = ["Choice", "Memory", "Platform", "choose"]
