from __future__ import annotations

import pytest
from weightstream.streaming import (
    ConfigError,
    StreamingConfig,
    VirtualDevices,
    count_of,
    format_bytes,
    format_rate,
    listed,
    parse_virtual_devices,
)


@pytest.mark.parametrize(
    ("text", "count", "budget"),
    [("2x24MB", 2, 24 << 20), ("1x1GB", 1, 1 << 30), (" 3 X 1.5 kb ", 3, 1536), ("1x4096", 1, 4096), ("1x7B", 1, 7)],
)
def test_virtual_devices_are_count_times_bytes(text: str, count: int, budget: int) -> None:
    assert parse_virtual_devices(text) == VirtualDevices(count, budget)


@pytest.mark.parametrize("text", ["", "2", "x", "24MB", "0x24MB", "2x0MB", "-1x3MB", "2x24TB", "2x24MB,1x3MB", "axb"])
def test_other_texts_are_refused_with_the_form_that_works(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 2x24MB"):
        parse_virtual_devices(text)


@pytest.mark.parametrize(
    ("settings", "slot_mb", "slots"),
    [
        ({}, 132, 3),
        ({}, 199, 2),
        ({}, 680, 2),
        ({}, 10, 4),
        ({"staging_bytes": 800_000_000}, 220, 3),
        ({"slots": 3}, 680, 3),
        ({"copy_streams": 0}, 10, 1),
    ],
)
def test_as_many_slots_as_staging_memory_holds(settings: dict[str, int], slot_mb: int, slots: int) -> None:
    assert StreamingConfig(**settings).slot_counts(slot_mb * 1_000_000)[0] == slots


@pytest.mark.parametrize("settings", [{"copy_streams": -1}, {"slots": -1}, {"vram_limit": -1}, {"packing": "auto"}])
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        StreamingConfig(**settings)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1000, "1000 B"),
        (1024, "1.0 KiB"),
        (680_000_000, "648 MiB"),
        (23.8e9, "22.2 GiB"),
        ((1 << 30) - 1, "1.0 GiB"),
    ],
)
def test_bytes_are_written_for_people(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_rates_are_decimal_as_those_of_buses() -> None:
    assert [format_rate(rate) for rate in (55.2e9, 999_960_000, 12)] == ["55.2 GB/s", "1.0 GB/s", "12 B/s"]


def test_one_is_counted_in_the_singular() -> None:
    assert [count_of(count, "block") for count in (0, 1, 57)] == ["0 blocks", "1 block", "57 blocks"]


@pytest.mark.parametrize(
    ("names", "text"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")]
)
def test_names_in_words(names: list[str], text: str) -> None:
    assert listed(names) == text
