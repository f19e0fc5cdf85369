"""Is a Kunlun XPU here? Answered from the file system alone: nothing is imported, no device is initialised."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

RUNTIME = "torch_xmlir"
"""The module of the vendor's PyTorch build."""


def kunlun(devices: Path = Path("/dev"), runtime: str = RUNTIME) -> tuple[bool, str]:
    """Whether device nodes and the vendor's PyTorch are both here, and the reason in words."""
    nodes = [node for node in devices.glob("xpu*") if node.name.removeprefix("xpu").isdigit()]
    if not nodes:
        return False, f"no {devices}/xpu* device"
    if find_spec(runtime) is None:
        return False, f"{len(nodes)} device node(s), but the vendor's PyTorch (module {runtime}) is not installed"
    return True, f"{len(nodes)} device node(s) and module {runtime}"
