"""Which implementation of an op runs, and why the others do not.

The registry reads the entry points of the group `loongforge.kernels` itself, so that this wheel works alone. It holds
all state: nothing is decided at import, and two registries never influence each other.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any

import torch
from packaging.requirements import Requirement

from loongforge.kernels.spec import API, KernelSpec

OWN = "loongforge-kernels"
"""The distribution of this package."""

GROUP = "loongforge.kernels"
"""Entry-point group; each entry is a tuple of KernelSpec."""


class KernelError(LookupError):
    """No implementation fits the request; the message says what was asked, what there is and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A spec and the distribution that registered it."""

    spec: KernelSpec
    owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The implementation to run."""

    spec: KernelSpec
    owner: str
    refused: tuple[str, ...]
    """One line for each implementation of higher priority that cannot run, with its reason."""
    call: Callable[..., Any]
    """The implementation."""

    def line(self) -> str:
        """What was chosen and why, in one line."""
        because = "".join(f"{refusal}; " for refusal in self.refused)
        return f"{self.spec.op}: {because}using {self.spec.impl}"


class Registry:
    """Implementations by op.

    `offers` come from `installed()` or, in tests, from the caller; `broken` are registrations that failed to load;
    `say` receives one line for each op at its first choice, the package's logger at level INFO when not given.
    """

    def __init__(
        self, offers: Iterable[Offer], broken: Iterable[str] = (), say: Callable[[str], None] | None = None
    ) -> None:
        self.broken = tuple(broken)
        self._say = say or logging.getLogger(__name__).info
        self._said: set[str] = set()
        self._choices: dict[tuple[str, torch.device, torch.dtype | None, str | None], Choice] = {}
        self._offers: dict[str, tuple[Offer, ...]] = {}
        for offer in sorted(offers, key=lambda o: (-o.spec.priority, o.spec.impl, o.owner)):
            self._offers[offer.spec.op] = (*self._offers.get(offer.spec.op, ()), offer)

    @classmethod
    def installed(cls, say: Callable[[str], None] | None = None, owners: Container[str] | None = None) -> Registry:
        """Every implementation that an installed distribution registers; a broken one is kept aside with its reason.

        `owners` names the distributions to take, besides this one; all when not given.
        """
        offers: list[Offer] = []
        broken: list[str] = []
        for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
            owner = entry.dist.name if entry.dist else "unknown"
            if owners is not None and owner != OWN and owner not in owners:
                continue
            try:
                offers += [Offer(spec=spec, owner=owner) for spec in _checked(entry)]
            except Exception as error:  # noqa: BLE001 - a third party's module may raise anything; it is reported
                broken.append(f"{owner}:{entry.name} ({entry.value}): {type(error).__name__}: {error}")
        return cls(offers, broken, say)

    @cached_property
    def ops(self) -> tuple[str, ...]:
        """Names of the ops, sorted."""
        return tuple(sorted(self._offers))

    def offers(self, op: str) -> tuple[Offer, ...]:
        """Implementations of `op`, highest priority first; `KernelError` with a hint when there is no such op."""
        if op not in self._offers:
            near = difflib.get_close_matches(op, self.ops, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            broken = f" Broken registrations: {'; '.join(self.broken)}." if self.broken else ""
            raise KernelError(f"no op {op!r}.{hint} Known: {', '.join(self.ops) or 'none'}.{broken}")
        return self._offers[op]

    def choose(
        self, op: str, device: torch.device | str, dtype: torch.dtype | None = None, impl: str | None = None
    ) -> Choice:
        """The best implementation of `op` for a device and dtype, loaded.

        `impl` asks for one by name, or by `owner:name` when two distributions use one name. Raises `KernelError` when
        the op or the implementation is unknown, or when what was asked for cannot run here.
        """
        key = (op, torch.device(device), dtype, impl)
        if key not in self._choices:
            self._choices[key] = self._decide(*key)
        return self._choices[key]

    def op(self, op: str, impl: str | None = None) -> Callable[..., Any]:
        """A callable with the op's signature that chooses by device and dtype of its first argument."""
        self.offers(op)

        def call(x: torch.Tensor, *rest: Any, **named: Any) -> Any:
            return self.choose(op, x.device, x.dtype, impl).call(x, *rest, **named)

        return call

    def _decide(self, op: str, device: torch.device, dtype: torch.dtype | None, impl: str | None) -> Choice:
        refused: list[str] = []
        for offer in self._candidates(op, impl):
            reason = refusal(offer.spec, device, dtype)
            if reason is None:
                call = self._load(offer)
                choice = Choice(spec=offer.spec, owner=offer.owner, refused=tuple(refused), call=call)
                if op not in self._said:
                    self._said.add(op)
                    self._say(choice.line())
                return choice
            refused.append(f"{offer.spec.impl} refused ({reason})")
        raise KernelError(f"{op}: nothing runs on {device.type}: {'; '.join(refused)}.")

    def _candidates(self, op: str, impl: str | None) -> tuple[Offer, ...]:
        offers = self.offers(op)
        if impl is None:
            return offers
        owner, _, name = impl.rpartition(":")
        found = tuple(o for o in offers if o.spec.impl == name and owner in ("", o.owner))
        if not found:
            known = ", ".join(o.spec.impl for o in offers)
            raise KernelError(f"{op}: no implementation {impl!r}. Known: {known}.")
        if len(found) > 1:
            choices = " or ".join(repr(f"{o.owner}:{name}") for o in found)
            raise KernelError(f"{op}: {name!r} is registered more than once. Say whose: {choices}.")
        return found

    @staticmethod
    def _load(offer: Offer) -> Callable[..., Any]:
        module, _, attribute = offer.spec.target.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise KernelError(
                f"{offer.spec.op}: {offer.spec.impl} from {offer.owner} does not load ({offer.spec.target}): {error}"
            ) from error


def refusal(spec: KernelSpec, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why `spec` cannot run on `device` with `dtype`; None when it can. Imports nothing of the implementation."""
    if spec.devices and device.type not in spec.devices:
        return f"needs {' or '.join(spec.devices)}, have {device.type}"
    name = str(dtype).removeprefix("torch.")
    if spec.dtypes and dtype is not None and name not in spec.dtypes:
        return f"takes {', '.join(spec.dtypes)}, not {name}"
    if lacking := [line for line in spec.requires if not _installed(line)]:
        return f"needs pip install {' '.join(repr(line) for line in lacking)}"
    if spec.capability is not None:
        if device.type != "cuda":
            return f"needs {spec.capability}, have {device.type}"
        if not torch.cuda.is_available():
            return f"needs {spec.capability}, torch sees no GPU"
        have = torch.cuda.get_device_capability(device)
        if have < _capability(spec.capability):
            return f"needs {spec.capability}, have sm_{have[0]}{have[1]}"
    return None


def _capability(text: str) -> tuple[int, int]:
    digits = text.removeprefix("sm_").rstrip("af")
    return int(digits[:-1]), int(digits[-1])


def _installed(line: str) -> bool:
    requirement = Requirement(line)
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def _checked(entry: EntryPoint) -> tuple[KernelSpec, ...]:
    specs = entry.load()
    if not isinstance(specs, tuple) or not all(isinstance(spec, KernelSpec) for spec in specs):
        raise TypeError(f"expected a tuple of KernelSpec, got {type(specs).__name__}")
    for spec in specs:
        if spec.api[0] != API[0] or spec.api[1] > API[1]:
            raise ValueError(
                f"{spec.op}/{spec.impl} speaks kernel API {spec.api[0]}.{spec.api[1]}, "
                f"this wheel speaks {API[0]}.{API[1]}; upgrade the older of the two"
            )
    return specs
