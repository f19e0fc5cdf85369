"""Is a built-in platform here? Answered without torch: listing stays fast and no device is initialised."""

from __future__ import annotations

from pathlib import Path


def cpu() -> tuple[bool, str]:
    """A CPU is always there."""
    return True, "always available"


def cuda() -> tuple[bool, str]:
    """Whether the NVIDIA driver shows a device node."""
    nodes = sorted(str(node) for node in Path("/dev").glob("nvidia[0-9]*"))
    if nodes:
        return True, f"{len(nodes)} device node(s)"
    if Path("/dev/dxg").exists():
        return True, "WSL device /dev/dxg"
    return False, "no /dev/nvidia* device"
