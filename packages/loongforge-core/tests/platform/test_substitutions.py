"""Substitutions explain themselves, install once, and leave torch as others expect it. Global: own processes."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

from loongforge.core.platform import cpu_runtime
from loongforge.core.platform.substitution import Substitution, install

START = """
import warnings
warnings.simplefilter("error")
from loongforge.core.platform import choose
from loongforge.core.megatron.start import start_megatron
import torch
compiler = torch.compile
platform = choose("cpu").platform()
start_megatron(platform)
"""


def python(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=300)


def test_every_one_says_why_where_and_until_when() -> None:
    everything = [one for group in cpu_runtime.GROUPS.values() for one in group]
    assert len(everything) > 40
    for one in everything:
        assert one.why, one.target
        assert ".py" in one.upstream, one.target
        assert one.remove_when, one.target
    targets = [one.target for one in everything]
    assert len(set(targets)) == len(targets)


def test_a_second_reason_for_one_attribute_is_refused() -> None:
    owner = ModuleType("owner")
    owner.call = len  # pyright: ignore[reportAttributeAccessIssue]
    first, second = (
        Substitution(owner=owner, name="call", make=lambda original: lambda: 1, why=why, upstream="", remove_when="")
        for why in ("one", "another")
    )
    first.install()
    first.install()
    with pytest.raises(AssertionError, match=r"owner.call is already replaced, for another reason"):
        second.install()


def test_installing_twice_wraps_once() -> None:
    owner = ModuleType("owner")
    owner.answer = lambda: 1  # type: ignore[attr-defined]
    wrap = Substitution(
        owner=owner, name="answer", make=lambda original: lambda: original() + 1, why="w", upstream="u", remove_when="r"
    )
    install((wrap, wrap))
    install((wrap,))
    assert owner.answer() == 2


def test_start_is_quiet_repeatable_and_gives_torch_back() -> None:
    done = python(
        START
        + """
first = {name: getattr(torch, name) for name in ("zeros", "empty", "arange")}
start_megatron(platform)
assert all(getattr(torch, name) is value for name, value in first.items()), "wrapped twice"
assert torch.compile is compiler
with torch.device("meta"):
    assert torch.zeros(2).is_meta
    assert torch.nn.Linear(2, 2).weight.is_meta
assert torch.zeros(2).device.type == "cpu"
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.zeros(2, device="meta").is_meta
from megatron.core.tensor_parallel import random
from loongforge.core.megatron.repairs import repairs
from megatron.core.optimizer import clip_grads
from loongforge.core.platform import cpu_norm, cpu_random
from loongforge.core.platform.substitution import ORIGINAL
for one in (*cpu_random.substitutions(), *cpu_norm.substitutions(), *repairs()):
    assert one.why and ".py" in one.upstream and one.remove_when, one.target
assert hasattr(clip_grads.l2_norm_impl, ORIGINAL)
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


def test_device_contexts_need_the_line_in_activate() -> None:
    """Without it `with torch.device("meta")` is silently ignored; when this fails, torch no longer needs it."""
    done = python(
        """
import torch
from loongforge.core.platform import cpu_runtime
from loongforge.core.platform.substitution import install
for group in cpu_runtime.GROUPS.values():
    install(group)
with torch.device("meta"):
    print(torch.zeros(2).device.type)
"""
    )
    assert done.stdout == "cpu\n", done.stdout + done.stderr
