"""What this wheel registers, as plain data."""

from loongforge.core.plugins import BalancerSpec, CommandSpec, Lazy, SourceSpec

TEXT = SourceSpec(
    name="text",
    api=(1, 0),
    open=Lazy("loongforge.data.text:open_text"),
    phases=("pretrain",),
    summary="Documents from .jsonl, Parquet, .txt or Megatron .bin/.idx, alone or blended by weight",
)
CHAT = SourceSpec(
    name="chat",
    api=(1, 0),
    open=Lazy("loongforge.data.chat:open_chat"),
    phases=("sft",),
    summary="Conversations from .jsonl or Parquet, packed, with an exact assistant mask",
)
VLM = SourceSpec(
    name="vlm",
    api=(1, 0),
    open=Lazy("loongforge.data.vlm:open_vlm"),
    phases=("pretrain", "sft"),
    modality="vision-language",
    extra="vision",
    summary="Conversations with images and videos from .jsonl, Parquet or webdataset shards",
)
ANALYTIC = BalancerSpec(
    name="analytic",
    api=(1, 0),
    open=Lazy("loongforge.data.balance.step:open_analytic"),
    summary="Even work in every step, by the FLOPs of the model's own geometry",
)
MEASURED = BalancerSpec(
    name="measured",
    api=(1, 0),
    open=Lazy("loongforge.data.balance.measured:open_measured"),
    summary="Even work in every step, by rates fitted to a run's own times (data.balance_costs)",
)
COMMAND = CommandSpec(
    name="data",
    api=(1, 0),
    command=Lazy("loongforge.data.cli:command"),
    summary="Prepare and look at data: preprocess, cache, pack, inspect, convert-to-webdataset, verify, fit-costs",
)
