"""Discovery policies, with the texts a user reads."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from loongforge.core import plugin_specs, plugins
from loongforge.core.errors import PluginError
from loongforge.core.plugins import Lazy

CORE = f"loongforge-core {version('loongforge-core')}"


def refusal(name: str, kind: str = "models") -> str:
    with pytest.raises(PluginError) as refused:
        plugins.load(kind, name)
    return str(refused.value)


def test_a_registered_family_loads_and_names_its_owner(acme) -> None:
    site = acme("acme-models", "acme_a")
    plugin = plugins.pick("models", "acme")
    assert (plugin.owner, plugin.state()) == ("acme-models 0.1.0", "ready")
    assert plugin.folder() == site / "acme_a"
    assert plugins.load("models", "acme").sizes == ("tiny",)


def test_reading_the_registrations_imports_nothing(acme, monkeypatch: pytest.MonkeyPatch) -> None:
    acme("acme-models", "acme_a")
    monkeypatch.setattr(plugin_specs, "import_module", None)
    monkeypatch.setattr("importlib.metadata.import_module", None)
    assert "acme" in plugins.registered("models")


def test_unknown_name_is_an_error_with_a_hint(acme) -> None:
    acme("acme-models", "acme_a")
    message = refusal("acmee")
    assert message.startswith("no model 'acmee'. Did you mean 'acme'? Known: acme")
    assert refusal("zzz").startswith("no model 'zzz'. Known: acme")


def test_a_tie_is_an_error_only_when_the_name_is_used(acme) -> None:
    acme("acme-models", "acme_a")
    acme("evil-acme", "acme_b")
    assert refusal("acme") == (
        "model 'acme' is registered by acme-models 0.1.0 and evil-acme 0.1.0. "
        "Say whose: 'acme-models:acme' or 'evil-acme:acme'."
    )
    assert [plugin.distribution for plugin in plugins.usable("models") if plugin.name == "acme"] == [
        "acme-models",
        "evil-acme",
    ]
    assert plugins.load("models", "evil-acme:acme").build.target == "acme_b.model:build"
    assert plugins.load("models", "Acme_Models:acme").build.target == "acme_a.model:build"


def test_a_wrong_owner_names_the_right_one(acme) -> None:
    acme("acme-models", "acme_a")
    assert refusal("other:acme") == "model 'acme' is not registered by 'other' but by acme-models 0.1.0."


def test_a_broken_plugin_does_not_break_its_neighbours(wheel, acme) -> None:
    acme("acme-models", "acme_a")
    wheel(
        "acme-broken",
        entries={"models": {"busted": "acme_busted:FAMILY", "absent": "acme_nowhere:FAMILY"}},
        files={"acme_busted.py": "import does_not_exist\n"},
    )
    expected = (
        "model 'busted' from acme-broken 0.1.0 failed to load (acme_busted:FAMILY): "
        "ModuleNotFoundError: No module named 'does_not_exist'"
    )
    assert refusal("busted") == expected
    assert plugins.pick("models", "busted").state() == f"broken: {expected}"
    assert "acme" in {plugin.name for plugin in plugins.usable("models")}
    assert "busted" not in {plugin.name for plugin in plugins.usable("models")}


def test_any_exception_of_a_spec_is_its_own(wheel) -> None:
    wheel("acme-broken", entries={"models": {"busted": "acme_one:FAMILY"}}, files={"acme_one.py": "1 / 0\n"})
    assert refusal("busted").endswith("(acme_one:FAMILY): ZeroDivisionError: division by zero")


@pytest.mark.parametrize("api", [(2, 0), (1, 1), (0, 9)])
def test_another_api_is_refused(acme, api: tuple[int, int]) -> None:
    acme("acme-models", "acme_a", api=api)
    assert refusal("acme") == (
        f"model 'acme' from acme-models 0.1.0 speaks plugin API {api[0]}.{api[1]}, {CORE} speaks 1.0. "
        "Upgrade the older of the two."
    )


@pytest.mark.parametrize("api", [1, (1,), (1, 0, 0), None])
def test_an_api_that_is_no_pair_is_refused(acme, api: object) -> None:
    acme("acme-models", "acme_a", api=api)
    assert refusal("acme") == "model 'acme' from acme-models 0.1.0 has no api=(major, minor)"


def test_a_kernel_speaks_the_api_of_the_kernels_wheel(wheel) -> None:
    spec = (
        "from loongforge.kernels.spec import KernelSpec\n"
        "K = (KernelSpec(op='rms_norm', impl='acme', target='a:b', api=(7, 0)),)\n"
    )
    wheel("acme-kernels", entries={"kernels": {"acme": "acme_k:K"}}, files={"acme_k.py": spec})
    said = refusal("acme", "kernels")
    assert said.startswith("kernel 'acme' from acme-kernels 0.1.0 speaks plugin API 7.0, loongforge-kernels ")


def test_kernels_are_a_tuple(wheel) -> None:
    spec = "from loongforge.kernels.spec import KernelSpec\nK = KernelSpec(op='rms_norm', impl='acme', target='a:b')\n"
    wheel("acme-kernels", entries={"kernels": {"acme": "acme_k:K"}}, files={"acme_k.py": spec})
    assert refusal("acme", "kernels") == "kernel 'acme' from acme-kernels 0.1.0: acme_k:K is a KernelSpec, not a tuple"


def test_a_spec_in_the_wrong_group_is_refused(wheel, acme) -> None:
    acme("acme-models", "acme_a")
    wheel("acme-device", entries={"platforms": {"acme": "acme_a.spec:FAMILY"}}, files={})
    assert refusal("acme", "platforms") == (
        "platform 'acme' from acme-device 0.1.0: acme_a.spec:FAMILY is a ModelFamily, not a PlatformSpec"
    )


def test_entry_point_and_spec_have_one_name(acme) -> None:
    acme("acme-models", "acme_a", name="other")
    assert refusal("acme") == (
        "model 'acme' from acme-models 0.1.0: acme_a.spec:FAMILY calls itself 'other'; "
        "the entry point and the spec must have one name"
    )


EXTRA = "Provides-Extra: big\nRequires-Dist: not-a-real-library>=2; extra == 'big'\nRequires-Dist: packaging>=1\n"


def test_a_missing_extra_names_the_install_line(acme) -> None:
    acme("acme-models", "acme_a", metadata=EXTRA, extra="big")
    assert plugins.pick("models", "acme").state() == "needs pip install 'acme-models[big]'"
    assert refusal("acme") == "model 'acme' needs not-a-real-library>=2: pip install 'acme-models[big]'"
    assert "acme" in {plugin.name for plugin in plugins.usable("models")}


def test_an_old_version_does_not_satisfy_an_extra(acme) -> None:
    acme("acme-models", "acme_a", metadata=EXTRA.replace("not-a-real-library>=2", "packaging>=9999"), extra="big")
    assert refusal("acme") == "model 'acme' needs packaging>=9999: pip install 'acme-models[big]'"


def test_an_installed_extra_is_ready(acme) -> None:
    acme("acme-models", "acme_a", metadata=EXTRA.replace("not-a-real-library>=2", "packaging"), extra="big")
    assert plugins.pick("models", "acme").state() == "ready"


def test_an_extra_reaches_through_the_extras_of_others(wheel, acme) -> None:
    wheel("acme-data", entries={}, files={}, metadata=EXTRA)
    chained = "Provides-Extra: all\nRequires-Dist: acme-data[big]>=0.1; extra == 'all'\n"
    acme("acme-models", "acme_a", metadata=chained, extra="all")
    assert plugins.pick("models", "acme").missing() == ["not-a-real-library>=2"]


def test_extras_that_name_each_other_end(acme) -> None:
    circle = "".join(
        f"Provides-Extra: {one}\nRequires-Dist: acme-models[{other}]; extra == '{one}'\n"
        for one, other in (("a", "b"), ("b", "a"))
    )
    acme("acme-models", "acme_a", metadata=circle, extra="a")
    assert plugins.pick("models", "acme").missing() == []


def test_an_extra_the_wheel_lacks_is_a_fault_of_the_wheel(acme) -> None:
    acme("acme-models", "acme_a", metadata=EXTRA, extra="huge")
    assert refusal("acme") == "model 'acme' from acme-models 0.1.0 asks for the extra 'huge', which its wheel lacks"


def test_filter_leaves_the_named_owner_and_core(acme, monkeypatch: pytest.MonkeyPatch) -> None:
    acme("acme-models", "acme_a")
    acme("evil-acme", "acme_b")
    monkeypatch.setenv("LOONGFORGE_PLUGINS", "evil-acme")
    assert plugins.load("models", "acme").build.target == "acme_b.model:build"
    assert set(plugins.registered("models")) == {"acme"}
    assert "cpu" in plugins.registered("platforms")


def test_filter_switches_one_off(acme, monkeypatch: pytest.MonkeyPatch) -> None:
    acme("acme-models", "acme_a")
    acme("evil-acme", "acme_b")
    before = set(plugins.registered("models"))
    monkeypatch.setenv("LOONGFORGE_PLUGINS", " -Evil_Acme ,")
    assert plugins.load("models", "acme").build.target == "acme_a.model:build"
    assert set(plugins.registered("models")) == before
    monkeypatch.setenv("LOONGFORGE_PLUGINS", "-evil-acme,-acme-models")
    assert refusal("acme") == (
        "model 'acme' from acme-models 0.1.0 and evil-acme 0.1.0 is switched off by "
        "LOONGFORGE_PLUGINS='-evil-acme,-acme-models'."
    )


@pytest.mark.parametrize("asked", ["acme-modles", "-acme-modles"])
def test_filter_refuses_a_name_that_owns_nothing(acme, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    acme("acme-models", "acme_a")
    monkeypatch.setenv("LOONGFORGE_PLUGINS", asked)
    with pytest.raises(PluginError) as refused:
        plugins.registered("platforms")
    assert str(refused.value).startswith(
        "LOONGFORGE_PLUGINS: no plugin is registered by 'acme-modles'. Did you mean 'acme-models'? Known: acme-models, "
    )


def test_core_cannot_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOONGFORGE_PLUGINS", "-loongforge-core")
    with pytest.raises(PluginError, match="loongforge-core cannot be switched off; nothing runs without it"):
        plugins.registered("models")


def test_folder_of_an_absent_package(wheel) -> None:
    wheel("acme-models", entries={"models": {"acme": "acme_gone.spec:FAMILY"}}, files={})
    with pytest.raises(PluginError, match=r"model 'acme' from acme-models 0\.1\.0: no module 'acme_gone\.spec'"):
        plugins.pick("models", "acme").folder()


def test_lazy_loads_and_names_what_is_absent() -> None:
    assert Lazy("pathlib:Path.cwd")()() == Path.cwd()
    for target, reason in (
        ("pathlib:Pth", "AttributeError: module 'pathlib' has no attribute 'Pth'"),
        ("no_such_module:x", "ModuleNotFoundError: No module named 'no_such_module'"),
        (":x", "ValueError: Empty module name"),
    ):
        with pytest.raises(PluginError) as refused:
            Lazy(target)()
        assert str(refused.value) == f"cannot load {target!r}: {reason}"


def test_our_own_registrations_are_whole() -> None:
    """Every entry point of the six wheels loads; what is installed may lack an extra, nothing may be broken."""
    ours = [
        plugin
        for kind in plugins.KINDS
        for rivals in plugins.registered(kind).values()
        for plugin in rivals
        if plugin.distribution.startswith("loongforge-")
    ]
    assert {plugin.name for plugin in ours} >= {"cpu", "cuda"}
    assert [plugin.state() for plugin in ours if plugin.state().startswith("broken")] == []
