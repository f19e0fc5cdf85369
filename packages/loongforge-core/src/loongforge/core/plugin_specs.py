"""What other wheels register: plain data about models, platforms, sources and all else that can be added.

Specs import the standard library and this module alone, through `core.plugins`; the heavy object behind one is imported
on first use.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from loongforge.core.errors import PluginError


@dataclass(frozen=True, slots=True)
class Lazy:
    """A `module:attribute` resolved on call, never at import."""

    target: str

    def __call__(self) -> Any:
        """Import the module and return the attribute; `PluginError` names the target when either is absent."""
        module, _, attribute = self.target.partition(":")
        try:
            found = import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError, ValueError) as error:  # ValueError: an empty module name
            raise PluginError(f"cannot load {self.target!r}: {type(error).__name__}: {error}") from error
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFamily:
    """One architecture in all its sizes (`loongforge.models`)."""

    name: str
    api: tuple[int, int]
    modality: str
    """`text`, `vision`, `diffusion` or `action`: what goes in."""
    sizes: tuple[str, ...]
    """Config names without `.yaml`, as in `configs`: `qwen3_0_6b`."""
    configs: str
    """Folder of the YAML files, relative to the package that holds the spec."""
    config: Lazy
    """Frozen dataclass of the geometry, with `from_hf(dict)`, `to_hf()` and `geometry()`."""
    build: Lazy
    """`build(config, transformer_config, ...) -> torch.nn.Module`: one pipeline chunk; see core.model.contract."""
    weights: Lazy
    """`weights(config) -> WeightTable`: the two-way Hugging Face table; see core.model.weights."""
    role: str = "foundation"
    """`foundation`, `image_encoder` or `image_projector`: the slot of a model that this family fills."""
    groups: tuple[str, ...] = ()
    """Further Hydra groups under `models/` that offer these sizes too: `image_encoder`, `qwen3`."""
    hf_architectures: tuple[str, ...] = ()
    """Values of `architectures` in a Hugging Face `config.json` that belong to this family, foundations only."""
    extra: str | None = None
    """Extra of the owning distribution that installs third-party libraries this family needs."""
    summary: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """A released model of several components (`loongforge.compositions`): who they are, and how it is written.

    The run's `model.model_type` names it. What it says about Hugging Face is optional: a composition of one's own has
    no architecture there, and its components are then saved side by side.
    """

    name: str
    """As `model.model_type` says it: `qwen3_vl`."""
    api: tuple[int, int]
    modality: str
    """`vision-language`."""
    processor: Lazy
    """`processor(model: ModelConfig) -> core.data.contract.VisualProcessor`: from images and videos to what the encoder
    takes, and where their features stand among the tokens."""
    sizes: tuple[str, ...] = ()
    """Config names without `.yaml`, as in `configs`: `qwen3_vl_8b`."""
    configs: str | None = None
    """Folder of the YAML files, relative to the package that holds the spec; each is a whole `model` section."""
    components: Lazy | None = None
    """`components(hf: Mapping) -> dict`: the `model` section that a Hugging Face `config.json` describes, with `family`
    and geometry fields of every component."""
    to_hf: Lazy | None = None
    """`to_hf(model: ModelConfig) -> dict`: `config.json` of the whole."""
    prefixes: Lazy | None = None
    """`prefixes(model: ModelConfig) -> dict[str, tuple[tuple[str, str], ...]]`: for every component, how the beginnings
    of its own Hugging Face names are spelled in the whole; the first that fits is exchanged, a name that none fits is
    not the component's."""
    modules: tuple[tuple[str, str], ...] = ()
    """Beginnings of names in a checkpoint of the whole, each with what the class in transformers calls them where that
    differs; adapters are named as the class is."""
    hf_architectures: tuple[str, ...] = ()
    """Values of `architectures` in a Hugging Face `config.json` of the whole."""
    token_ids: tuple[tuple[str, str], ...] = ()
    """Keys of that `config.json` that hold the id of a token, each with the token's text:
    `("image_token_id", "<|image_pad|>")`. The run's tokenizer says the ids."""
    extra: str | None = None
    summary: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformSpec:
    """A device (`loongforge.platforms`)."""

    name: str
    api: tuple[int, int]
    device: str
    """torch device type."""
    probe: Lazy
    """`probe() -> (available: bool, reason: str)`; must not initialise the device."""
    platform: Lazy
    """`platform() -> core.platform.Platform`."""
    extra: str | None = None
    summary: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """A source of training samples (`loongforge.data`)."""

    name: str
    api: tuple[int, int]
    open: Lazy
    """`open(request: core.data.contract.SourceRequest) -> core.data.contract.SampleSource`."""
    phases: tuple[str, ...] = ("pretrain", "sft")
    """Training phases that pick this source when the user names none."""
    modality: str = "text"
    """`text`, or `vision-language` for a source that also answers images and videos; picked by the model's encoder."""
    extra: str | None = None
    summary: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancerSpec:
    """A way to deal the samples of a step to ranks (`loongforge.balancers`); the run's `data.balance` names it."""

    name: str
    api: tuple[int, int]
    open: Lazy
    """`open(plan: core.plan.Plan) -> core.data.balance.Balancer`. Another cost model alone is
    `loongforge.data.balance.StepBalancer(plan, cost)`."""
    extra: str | None = None
    summary: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatSpec:
    """A checkpoint format other than the trainer's own (`loongforge.checkpoints`); see core.checkpoint.contract."""

    name: str
    api: tuple[int, int]
    detect: Lazy
    """`detect(path) -> bool`: is this directory written in this format? Imports no torch."""
    read_config: Lazy
    """`read_config(path) -> dict`: the model's own configuration. Imports no torch."""
    load: Lazy
    save: Lazy
    holds: Literal["model", "adapter"] = "model"
    """Whole weights, for `--load`; or adapters of a model, for `--lora-adapter-path`, whose `read_config` answers the
    fields of the section `lora`."""
    extra: str | None = None
    summary: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerSpec:
    """An experiment tracker (`loongforge.trackers`)."""

    name: str
    api: tuple[int, int]
    make: Lazy
    """`make(config: RunConfig, directory: Path) -> core.watch.Tracker`."""
    extra: str | None = None
    summary: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandSpec:
    """A verb of the command line (`loongforge.commands`): `command(argv: list[str]) -> int`, the exit code.

    A name with a dot is said in two words: `bench.mtp` is `loongforge bench mtp`; another wheel may add `bench.ours`.
    """

    name: str
    api: tuple[int, int]
    command: Lazy
    extra: str | None = None
    summary: str = ""
