"""Choose the platform of this run, and say why."""

from __future__ import annotations

from dataclasses import dataclass

from loongforge.core import env, plugins
from loongforge.core.errors import PlatformError, PluginError
from loongforge.core.platform.contract import Platform


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A platform and the sentence that says why it was chosen."""

    name: str
    reason: str
    spec: plugins.PlatformSpec

    def platform(self) -> Platform:
        """The platform itself; imports what it needs."""
        return self.spec.platform()()


def choose(name: str | None = None) -> Choice:
    """The platform called `name`, or named by LOONGFORGE_PLATFORM, or the only accelerator whose probe says it is here.

    Raises `PlatformError` when the named one is not available or when two accelerators are.
    """
    asked = name or env.platform_name()
    if asked != "auto":
        return _named(asked, "asked for" if name else "LOONGFORGE_PLATFORM")
    present: dict[str, str] = {}
    refused: list[str] = []
    for plugin in plugins.usable("platforms"):
        if plugin.name != "cpu":
            available, reason = plugin.spec.probe()()
            if available:
                present[plugin.name] = reason
            else:
                refused.append(f"{plugin.name}: {reason}")
    if len(present) > 1:
        found = " and ".join(f"{name} ({reason})" for name, reason in present.items())
        raise PlatformError(
            f"several platforms are here: {found}. Say which: LOONGFORGE_PLATFORM={next(iter(present))}."
        )
    if present:
        chosen, reason = next(iter(present.items()))
        return Choice(name=chosen, reason=f"auto: {reason}", spec=plugins.load("platforms", chosen))
    # A device whose driver or library is broken must be seen, not silently replaced by the CPU.
    reason = "auto: no accelerator is here" + (f"; {'; '.join(refused)}" if refused else "")
    return Choice(name="cpu", reason=reason, spec=plugins.load("platforms", "cpu"))


def _named(name: str, who: str) -> Choice:
    try:
        spec: plugins.PlatformSpec = plugins.load("platforms", name)
    except PluginError as error:
        raise PlatformError(f"platform {name!r} ({who}): {error}") from error
    available, reason = spec.probe()()
    if not available:
        raise PlatformError(f"platform {name!r} ({who}) is not available here: {reason}.")
    return Choice(name=spec.name, reason=f"{who}; {reason}", spec=spec)
