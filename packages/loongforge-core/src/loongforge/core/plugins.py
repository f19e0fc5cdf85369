"""Find, check and load what other wheels registered.

Discovery reads entry-point *metadata* only; a spec is plain data (standard library and this module), and the heavy
object behind it is imported on first use through `Lazy`. Policies: a tie between two owners is an error only when the
name is used; a broken plugin never breaks its neighbours; an extra installs libraries, it never switches a plugin on.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from loongforge.core import env
from loongforge.core.errors import PluginError
from loongforge.core.plugin_specs import BalancerSpec as BalancerSpec
from loongforge.core.plugin_specs import CommandSpec as CommandSpec
from loongforge.core.plugin_specs import Composition as Composition
from loongforge.core.plugin_specs import FormatSpec as FormatSpec
from loongforge.core.plugin_specs import Lazy as Lazy
from loongforge.core.plugin_specs import ModelFamily as ModelFamily
from loongforge.core.plugin_specs import PlatformSpec as PlatformSpec
from loongforge.core.plugin_specs import SourceSpec as SourceSpec
from loongforge.core.plugin_specs import TrackerSpec as TrackerSpec

API = (1, 0)
"""Plugin contract. Major: breaking. Minor: additions with defaults."""

KINDS = ("models", "compositions", "platforms", "kernels", "data", "balancers", "checkpoints", "trackers", "commands")
"""Entry-point groups, each read as `loongforge.<kind>`."""

OWN = "loongforge-core"
"""The distribution that cannot be switched off: without its CPU platform nothing runs."""


SPECS: dict[str, type] = {
    "models": ModelFamily,
    "compositions": Composition,
    "platforms": PlatformSpec,
    "data": SourceSpec,
    "balancers": BalancerSpec,
    "checkpoints": FormatSpec,
    "trackers": TrackerSpec,
    "commands": CommandSpec,
}
"""What an entry of each kind loads; a `kernels` entry is a tuple of loongforge.kernels.spec.KernelSpec instead."""


@dataclass(frozen=True)
class Plugin:
    """One registration: who registered which name, and its spec, not yet loaded."""

    kind: str
    entry: EntryPoint

    @property
    def name(self) -> str:
        """The registered name."""
        return self.entry.name

    @property
    def label(self) -> str:
        """Kind and name, as messages say them: `model 'qwen3'`."""
        return f"{_singular(self.kind)} {self.name!r}"

    @property
    def distribution(self) -> str:
        """Name of the owning distribution."""
        return self.entry.dist.name if self.entry.dist else "unknown"

    @property
    def owner(self) -> str:
        """Name and version of the owning distribution."""
        return f"{self.distribution} {self.entry.dist.version}" if self.entry.dist else "an unknown distribution"

    @cached_property
    def spec(self) -> Any:
        """The spec, imported and checked now; `PluginError` when it is absent, of another kind or plugin API."""
        try:
            spec: Any = self.entry.load()
        except Exception as error:  # a third party's module may raise anything; it must not break its neighbours
            reason = f"{type(error).__name__}: {error}"
            raise PluginError(
                f"{self.label} from {self.owner} failed to load ({self.entry.value}): {reason}"
            ) from error
        expected = SPECS.get(self.kind, tuple)
        found: type[Any] = spec.__class__
        if not issubclass(found, expected):
            raise PluginError(
                f"{self.label} from {self.owner}: {self.entry.value} is a {found.__name__}, not a {expected.__name__}"
            )
        for part in spec if expected is tuple else (spec,):
            check_api(part, self)
        if expected is not tuple and spec.name != self.name:
            raise PluginError(
                f"{self.label} from {self.owner}: {self.entry.value} calls itself {spec.name!r}; "
                "the entry point and the spec must have one name"
            )
        return spec

    def missing(self) -> list[str]:
        """Requirements of the spec's extra that this environment does not satisfy, as requirement strings."""
        extra = getattr(self.spec, "extra", None)
        owner = self.entry.dist
        if not extra or not owner:
            return []
        if plain(extra) not in map(plain, owner.metadata.get_all("Provides-Extra") or ()):
            raise PluginError(f"{self.label} from {self.owner} asks for the extra {extra!r}, which its wheel lacks")
        return unmet(owner, extra)

    def folder(self) -> Path:
        """Directory of the package that holds the spec module; finds it without importing the spec."""
        try:
            module = find_spec(self.entry.module)
        except ImportError:  # the parent package is absent or broken
            module = None
        if module is None or module.origin is None:
            raise PluginError(f"{self.label} from {self.owner}: no module {self.entry.module!r}")
        return Path(module.origin).parent

    def state(self) -> str:
        """`ready`, `needs pip install ...` or `broken: reason`."""
        try:
            lacking = self.missing()
        except PluginError as error:
            return f"broken: {error}"
        return f"needs {self.install_line()}" if lacking else "ready"

    def install_line(self) -> str:
        """The command that installs what `missing` lists."""
        return f"pip install '{self.distribution}[{self.spec.extra}]'"


def check_api(spec: Any, plugin: Plugin) -> None:
    """Refuse a spec that speaks another plugin API than this core; a kernel's is the API of loongforge-kernels."""
    api: Any = getattr(spec, "api", None)
    if not isinstance(api, tuple) or len(cast(tuple[Any, ...], api)) != 2:
        raise PluginError(f"{plugin.label} from {plugin.owner} has no api=(major, minor)")
    major, minor = cast(tuple[int, int], api)
    kernel = plugin.kind == "kernels"
    ours: tuple[int, int] = Lazy("loongforge.kernels.spec:API")() if kernel else API
    if major != ours[0] or minor > ours[1]:
        speaker = "loongforge-kernels" if kernel else OWN
        raise PluginError(
            f"{plugin.label} from {plugin.owner} speaks plugin API {major}.{minor}, "
            f"{speaker} {version(speaker)} speaks {ours[0]}.{ours[1]}. Upgrade the older of the two."
        )


def unmet(owner: Distribution, extra: str = "", _seen: frozenset[tuple[str, str]] = frozenset()) -> list[str]:
    """Requirements of `owner` that are not installed in a matching version, as requirement strings.

    With an `extra` only those that belong to it, including what the extras it names of other distributions ask for.
    """
    from packaging.requirements import Requirement

    lacking: list[str] = []
    for line in owner.requires or ():
        requirement = Requirement(line)
        marker = requirement.marker
        wanted = marker is None or marker.evaluate({"extra": extra})
        if not wanted or (extra and (marker is None or marker.evaluate({"extra": ""}))):
            continue
        if not met(line):
            lacking.append(str(requirement).partition(";")[0].strip())
            continue
        for inner in sorted(requirement.extras):
            key = (plain(requirement.name), inner)
            if key not in _seen:
                lacking += unmet(distribution(requirement.name), inner, _seen | {key})
    return lacking


def met(line: str) -> bool:
    """Whether the distribution that a requirement string names is installed in a matching version."""
    from packaging.requirements import Requirement

    requirement = Requirement(line)
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def registered(kind: str) -> dict[str, tuple[Plugin, ...]]:
    """All registrations of one kind by name, sorted, LOONGFORGE_PLUGINS applied. Reads metadata, imports nothing."""
    allowed = _allowed()
    return _by_name(plugin for plugin in _all(kind) if allowed is None or plain(plugin.distribution) in allowed)


def pick(kind: str, name: str) -> Plugin:
    """The one registration of `name` or `owner:name`; `PluginError` with a hint when unknown or ambiguous."""
    owner, _, bare = name.rpartition(":")
    plugins = registered(kind)
    label = _singular(kind)
    if bare not in plugins:
        refuse_switched_off(kind, bare)
        raise PluginError(f"no {label} {bare!r}.{did_you_mean(bare, plugins)} Known: {', '.join(plugins) or 'none'}.")
    rivals = plugins[bare]
    chosen = [plugin for plugin in rivals if not owner or plain(plugin.distribution) == plain(owner)]
    if not chosen:
        raise PluginError(f"{label} {bare!r} is not registered by {owner!r} but by {_owners(rivals)}.")
    if len(chosen) > 1:
        choices = " or ".join(repr(f"{plugin.distribution}:{bare}") for plugin in rivals)
        raise PluginError(f"{label} {bare!r} is registered by {_owners(rivals)}. Say whose: {choices}.")
    return chosen[0]


def refuse_switched_off(kind: str, name: str) -> None:
    """Raise `PluginError` when `name` is installed and LOONGFORGE_PLUGINS hides it."""
    hidden = () if name in registered(kind) else _by_name(_all(kind)).get(name, ())
    if hidden:
        asked = ",".join(env.plugin_filter())
        raise PluginError(
            f"{_singular(kind)} {name!r} from {_owners(hidden)} is switched off by LOONGFORGE_PLUGINS={asked!r}."
        )


def load(kind: str, name: str) -> Any:
    """The spec called `name`, checked: known, unambiguous, loadable, same plugin API, extra installed."""
    plugin = pick(kind, name)
    if lacking := plugin.missing():
        raise PluginError(f"{plugin.label} needs {', '.join(lacking)}: {plugin.install_line()}")
    return plugin.spec


def usable(kind: str) -> Iterator[Plugin]:
    """Registrations that load; a broken one is left out here and shown by `loongforge list`."""
    for rivals in registered(kind).values():
        for plugin in rivals:
            try:
                _ = plugin.spec
            except PluginError:
                continue
            yield plugin


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'nearest'?`, with its leading space, or nothing when no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def plain(distribution_name: str) -> str:
    """The spelling under which two names of one distribution are equal: `Acme_Models` is `acme-models`."""
    return re.sub(r"[-_.]+", "-", distribution_name).lower()


def _allowed() -> frozenset[str] | None:
    """Plain names of the distributions that LOONGFORGE_PLUGINS leaves; None when it is unset.

    `a,b` leaves a and b, `-a` leaves all but a; loongforge-core always stays. `PluginError` when a name owns no plugin.
    """
    asked = env.plugin_filter()
    if not asked:
        return None
    owners = {plain(plugin.distribution) for kind in KINDS for plugin in _all(kind)}
    only, off = set[str](), set[str]()
    for part in asked:
        name = plain(part.removeprefix("-"))
        if name not in owners:
            typed = part.removeprefix("-")
            known = ", ".join(sorted(owners))
            hint = did_you_mean(name, owners)
            raise PluginError(f"LOONGFORGE_PLUGINS: no plugin is registered by {typed!r}.{hint} Known: {known}.")
        if part.startswith("-") and name == OWN:
            raise PluginError(f"LOONGFORGE_PLUGINS: {OWN} cannot be switched off; nothing runs without it.")
        (off if part.startswith("-") else only).add(name)
    return frozenset(((only or owners) - off) | {OWN})


def _all(kind: str) -> list[Plugin]:
    assert kind in KINDS, f"unknown kind {kind!r}"
    entries = sorted(entry_points(group=f"loongforge.{kind}"), key=lambda entry: (entry.name, entry.value))
    return [Plugin(kind, entry) for entry in entries]


def _by_name(plugins: Iterable[Plugin]) -> dict[str, tuple[Plugin, ...]]:
    found: dict[str, tuple[Plugin, ...]] = {}
    for plugin in plugins:
        found[plugin.name] = (*found.get(plugin.name, ()), plugin)
    return found


def _singular(kind: str) -> str:
    return "data source" if kind == "data" else "checkpoint format" if kind == "checkpoints" else kind.removesuffix("s")


def _owners(plugins: tuple[Plugin, ...]) -> str:
    return " and ".join(plugin.owner for plugin in plugins)
