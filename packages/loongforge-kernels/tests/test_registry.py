"""Choosing an implementation, and saying why another was refused."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import torch

from loongforge.kernels import registry
from loongforge.kernels.registry import KernelError, Offer, Registry
from loongforge.kernels.spec import KERNELS, KernelSpec


def made(*specs: KernelSpec, owner: str = "acme", say=None) -> Registry:
    return Registry([Offer(spec=spec, owner=owner) for spec in specs], say=say)


def spec(impl: str, **named) -> KernelSpec:
    return KernelSpec(op="rms_norm", impl=impl, target="math:sqrt", **named)


def test_a_refusal_is_explained_once():
    said: list[str] = []
    kernels = made(spec("reference"), spec("triton", devices=("cuda",), priority=20), say=said.append)
    assert kernels.choose("rms_norm", "cpu", torch.float32).spec.impl == "reference"
    assert kernels.choose("rms_norm", "cpu", torch.bfloat16).spec.impl == "reference"
    assert said == ["rms_norm: triton refused (needs cuda, have cpu); using reference"]


def test_every_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert registry.refusal(spec("a", capability="sm_80"), cuda, None) == "needs sm_80, torch sees no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert registry.refusal(spec("a", capability="sm_90a"), cuda, None) == "needs sm_90a, have sm_86"
    assert registry.refusal(spec("a", capability="sm_80"), cuda, None) is None
    assert registry.refusal(spec("a", capability="sm_100"), cpu, None) == "needs sm_100, have cpu"
    assert registry.refusal(spec("a", dtypes=("bfloat16",)), cpu, torch.float32) == "takes bfloat16, not float32"
    assert (
        registry.refusal(spec("a", requires=("no-such-wheel>=1",)), cpu, None) == "needs pip install 'no-such-wheel>=1'"
    )
    assert registry.refusal(spec("a", requires=("torch>=1",)), cpu, None) is None


def test_ties_go_to_the_first_name():
    assert made(spec("b", priority=1), spec("a", priority=1), spec("c")).choose("rms_norm", "cpu").spec.impl == "a"


def test_an_explicit_implementation():
    kernels = made(spec("reference"), spec("triton", devices=("cuda",), priority=20), spec("fast", priority=9))
    assert kernels.choose("rms_norm", "cpu", impl="reference").spec.impl == "reference"
    with pytest.raises(KernelError, match=r"nothing runs on cpu: triton refused \(needs cuda, have cpu\)"):
        kernels.choose("rms_norm", "cpu", impl="triton")
    with pytest.raises(KernelError, match=r"no implementation 'tritn'. Known: triton, fast, reference"):
        kernels.choose("rms_norm", "cpu", impl="tritn")


def test_two_owners_of_one_name():
    kernels = Registry([Offer(spec=spec("fast"), owner=owner) for owner in ("acme", "zeta")])
    assert kernels.choose("rms_norm", "cpu").owner == "acme"
    assert kernels.choose("rms_norm", "cpu", impl="zeta:fast").owner == "zeta"
    with pytest.raises(KernelError, match="Say whose: 'acme:fast' or 'zeta:fast'"):
        kernels.choose("rms_norm", "cpu", impl="fast")


def test_an_unknown_op_has_a_hint():
    with pytest.raises(KernelError, match=r"no op 'rmsnorm'. Did you mean 'rms_norm'\? Known: rms_norm"):
        made(spec("reference")).choose("rmsnorm", "cpu")


def test_a_target_that_does_not_load():
    broken = KernelSpec(op="rms_norm", impl="gone", target="math:no_such_function")
    with pytest.raises(KernelError, match=r"rms_norm: gone from acme does not load \(math:no_such_function\)"):
        made(broken).choose("rms_norm", "cpu")


def test_installed_kernels_run_through_the_registry():
    kernels = Registry.installed()
    assert {"rms_norm", "swiglu", "rope", "cross_entropy", "linear_cross_entropy", "adamw"} <= set(kernels.ops)
    x, weight = torch.randn(3, 8), torch.ones(8)
    eager = kernels.op("rms_norm")(x, weight, eps=1e-5)
    assert kernels.choose("rms_norm", "cpu", torch.float32).spec.impl == "eager"
    assert torch.allclose(eager, kernels.op("rms_norm", impl="reference")(x, weight, eps=1e-5))


def test_owners_that_are_not_wanted_offer_nothing(monkeypatch):
    entry = EntryPoint("acme", "loongforge.kernels.spec:KERNELS", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    assert "rms_norm" in Registry.installed(owners={"unknown"}).ops, "an entry without a distribution"
    assert Registry.installed(owners=()).ops == ()


def test_a_broken_plugin_does_not_break_its_neighbours(monkeypatch):
    bad = EntryPoint("bad", "no_such_module_at_all:KERNELS", registry.GROUP)
    odd = EntryPoint("odd", "math:pi", registry.GROUP)
    good = EntryPoint("builtin", "loongforge.kernels.spec:KERNELS", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [bad, odd, good])
    kernels = Registry.installed()
    assert "rms_norm" in kernels.ops
    assert len(kernels.broken) == 2
    with pytest.raises(KernelError, match="Broken registrations: unknown:bad"):
        kernels.offers("bad_op")


def test_another_api_is_refused(monkeypatch):
    newer = (KernelSpec(op="x", impl="y", target="math:pi", api=(1, 99)),)
    monkeypatch.setattr(EntryPoint, "load", lambda self: newer)
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("new", "a:b", registry.GROUP)])
    assert "speaks kernel API 1.99, this wheel speaks 1.0" in Registry.installed().broken[0]


@pytest.mark.parametrize("one", KERNELS, ids=lambda s: f"{s.op}-{s.impl}")
def test_every_target_exists(one):
    module, _, attribute = one.target.partition(":")
    anywhere = replace(one, capability=None)  # asking a GPU what it can needs one
    if one.requires and registry.refusal(anywhere, torch.device(one.devices[0]), None):
        pytest.skip(f"{one.target} needs {one.requires}, which this environment lacks")
    assert callable(getattr(importlib.import_module(module), attribute))


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(' '.join(sys.modules))"
    return set(
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    )


def test_the_spec_imports_no_torch_and_nothing_imports_core():
    assert "torch" not in modules_after("import loongforge.kernels.spec")
    loaded = modules_after("from loongforge.kernels.registry import Registry; Registry.installed().op('swiglu')")
    assert "torch" in loaded  # the check can fail
    assert not [name for name in loaded if name.startswith("loongforge.core")]
