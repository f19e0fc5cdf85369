"""Which registered source reads the data of a run. Imports no torch: the command line asks before anything starts."""

from __future__ import annotations

from loongforge.core import plugins
from loongforge.core.config.run import RunConfig
from loongforge.core.errors import DataError


def source_of(config: RunConfig) -> plugins.SourceSpec:
    """The source that the run names, or the only one that reads its modality in its phase.

    Raises `DataError` when there are no data or not exactly one source, `PluginError` for a name that nobody has.
    """
    section, phase = config.data, config.train.training_phase
    modality = "text" if config.model.image_encoder is None else "vision-language"
    if section.source:
        return plugins.load("data", section.source)
    if not section.data_path:
        raise DataError(
            "no data: give --data-path FILE (.jsonl, .txt, a .bin/.idx prefix, or .tar shards with images), or "
            "data.source=mock for random ones."
        )
    specs = [(plugin.name, plugin.spec) for plugin in plugins.usable("data")]
    fitting = [name for name, spec in specs if phase in spec.phases and spec.modality == modality and name != "mock"]
    if not fitting:
        extra = "loongforge-data" if modality == "text" else "'loongforge-data[vision]'"
        raise DataError(f"no registered source reads {modality} data for {phase!r}: pip install {extra}.")
    if len(fitting) > 1:
        raise DataError(
            f"several sources read {modality} data for {phase!r}: {', '.join(fitting)}. Say which: data.source=NAME."
        )
    return plugins.load("data", fitting[0])
