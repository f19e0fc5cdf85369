"""Checks of a config's numbers; each answers the problems it found, worded alike in every family."""

from __future__ import annotations

from typing import Any, get_args

from loongforge.core.model.geometry import LoadBalancing


def wrong_counts(label: str, config: Any, *names: str) -> list[str]:
    """Fields that must be whole numbers of at least 1."""
    values = {name: getattr(config, name) for name in names}
    return [
        f"{label}: {name} must be a whole number of at least 1, got {value!r}."
        for name, value in values.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]


def wrong_numbers(label: str, config: Any, *names: str) -> list[str]:
    """Fields that must be numbers above 0."""
    values = {name: getattr(config, name) for name in names}
    return [
        f"{label}: {name} must be a number above 0, got {value!r}."
        for name, value in values.items()
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0
    ]


def wrong_rates(label: str, config: Any, *names: str) -> list[str]:
    """Fields that must be numbers of at least 0."""
    values = {name: getattr(config, name) for name in names}
    return [
        f"{label}: {name} must be a number of at least 0, got {value!r}."
        for name, value in values.items()
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 0
    ]


def wrong_switches(label: str, config: Any, *names: str) -> list[str]:
    """Fields that must be true or false."""
    values = {name: getattr(config, name) for name in names}
    return [
        f"{label}: {name} must be true or false, got {value!r}."
        for name, value in values.items()
        if not isinstance(value, bool)
    ]


def wrong_choices(label: str, config: Any, name: str, known: tuple[str, ...]) -> list[str]:
    """A field that must be one of the words `known`."""
    value = getattr(config, name)
    return [] if value in known else [f"{label}: {name} must be one of {', '.join(known)}, got {value!r}."]


def wrong_balancing(label: str, config: Any) -> list[str]:
    """The load-balancing loss is one of those there are."""
    return wrong_choices(label, config, "moe_router_load_balancing_type", get_args(LoadBalancing))


def wrong_groups(label: str, config: Any) -> list[str]:
    """Query heads share key/value heads evenly, and rotation pairs the channels of a head."""
    problems: list[str] = []
    heads, groups, width = config.num_attention_heads, config.num_query_groups, config.kv_channels
    if heads % groups:
        problems.append(f"{label}: num_attention_heads={heads!r} must be a multiple of num_query_groups={groups!r}.")
    if width % 2:
        problems.append(f"{label}: kv_channels={width!r} must be even, rotation pairs its channels.")
    return problems


def wrong_head(label: str, config: Any) -> list[str]:
    """The hidden size is shared evenly among the heads, and rotation pairs the channels of one."""
    width, heads = config.hidden_size, config.num_attention_heads
    if width % (2 * heads):
        return [f"{label}: hidden_size={width!r} must be a multiple of 2 x num_attention_heads={heads!r}."]
    return []


def wrong_sections(label: str, config: Any) -> list[str]:
    """Sections of multimodal positions share all rotated pairs of a head among time, height and width."""
    section = config.mrope_section
    if section is None:
        if getattr(config, "mrope_interleaved", False):
            return [f"{label}: mrope_interleaved=True needs a mrope_section; ordinary positions have no sections."]
        return []
    pairs = config.kv_channels // 2
    if len(section) != 3 or any(one < 1 for one in section) or sum(section) != pairs:
        return [
            f"{label}: mrope_section={tuple(section)!r} must be three counts of at least 1 (time, height, width) that "
            f"add up to kv_channels / 2 = {pairs}."
        ]
    return []


def wrong_experts(label: str, config: Any) -> list[str]:
    """A token cannot go to more experts than there are."""
    count, topk = config.num_experts, config.moe_router_topk
    if topk > count:
        return [f"{label}: moe_router_topk={topk!r} must not exceed num_experts={count!r}."]
    return []


def wrong_rotation(label: str, config: Any) -> list[str]:
    """The rotated share of a head is a share, and pairs channels."""
    share = config.rotary_percent
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        return [f"{label}: rotary_percent must be above 0 and at most 1, got {share!r}."]
    if (rotated := config.kv_channels * share) % 2:
        return [
            f"{label}: kv_channels={config.kv_channels!r} x rotary_percent={share!r} = {rotated:g} must be an even "
            "whole number, rotation pairs its channels."
        ]
    return []
