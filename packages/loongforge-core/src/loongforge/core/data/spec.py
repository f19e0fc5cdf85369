"""Built-in data sources, as plain data."""

from loongforge.core.plugins import Lazy, SourceSpec

MOCK = SourceSpec(
    name="mock",
    api=(1, 0),
    open=Lazy("loongforge.core.data.mock:open_mock"),
    phases=(),
    summary="Random tokens; needs no file",
)
