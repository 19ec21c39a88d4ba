from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from profiles.errors import InputError
from profiles.library import Figure, HardwareEntry, InterconnectEntry, find_hardware_entry, hardware_entries, names
from simulator.model import BYTES

EXPECTED = {
    "NVIDIA GeForce RTX 4090": ("rtx-4090", 24, 1008),
    "RTXPRO6000": ("rtx-pro-6000", 96, 1597),
    "NVIDIA L4": ("l4", 24, 300),
    "NVIDIA L40S": ("l40s", 48, 864),
    "NVIDIA A10G": ("a10g", 24, 600),
    "NVIDIA A100-SXM4-40GB": ("a100-40g", 40, 1555),
    "NVIDIA A100-SXM4-80GB": ("a100-80g", 80, 2039),
    "NVIDIA H100 80GB HBM3": ("h100-sxm", 80, 3350),
    "NVIDIA H200": ("h200", 141, 4800),
    "NVIDIA B200": ("b200", 180, 7700),
    "AMD Instinct MI300X": ("mi300x", 192, 5300),
    "TPU v6e": ("tpu-v6e", 32, 1638),
}
ENTRIES = hardware_entries()


def figures(entry: HardwareEntry | InterconnectEntry) -> Iterator[tuple[str, Figure]]:
    for name, value in entry:
        if isinstance(value, Figure):
            yield name, value
        elif isinstance(value, InterconnectEntry):
            yield from figures(value)
        elif isinstance(value, dict):
            yield from value.items()


@pytest.mark.parametrize(("called", "expected"), EXPECTED.items())
def test_well_known_devices_are_found_with_their_memory_and_bandwidth(called, expected):
    name, nominal_gb, gb_per_s = expected
    entry = find_hardware_entry(called)

    assert entry.name == name
    assert find_hardware_entry(name) == entry
    # What software sees is below the nominal size in GiB and above 0.9 of it.
    assert 0.9 * nominal_gb * 2**30 < entry.memory_bytes.value <= nominal_gb * 2**30 * 1.001
    assert entry.memory_bandwidth.value == pytest.approx(gb_per_s * 1e9, rel=0.001)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_figure_says_where_it_is_from(entry):
    found = dict(figures(entry))

    assert {"memory_bytes", "memory_bandwidth", "bf16"} <= set(found)
    assert [name for name, figure in found.items() if not figure.source.strip()] == []


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_device_loads_under_its_name_and_aliases_with_plausible_numbers(entry):
    hardware = entry.hardware()

    assert [find_hardware_entry(name) for name in (entry.name, *entry.aliases)] == [entry] * (1 + len(entry.aliases))
    assert set(hardware.peak_flops) <= set(BYTES)
    assert 8 * 2**30 < hardware.memory_bytes < 400 * 2**30
    # Reading all of its memory takes a device 10 to 100 ms.
    assert 0.01 < hardware.memory_bytes / hardware.memory_bandwidth < 0.1
    assert 1e13 < hardware.flops("bfloat16") < 1e16
    # Dense figures: half the width is about twice the rate, never the four times of a sparse one.
    for narrow in ("fp8", "int8"):
        if narrow in hardware.peak_flops:
            assert 1.9 < hardware.peak_flops[narrow] / hardware.flops("bfloat16") < 4.01
    link = hardware.interconnect
    assert link.kind == "none" or (0 < link.bandwidth < hardware.memory_bandwidth and 0 <= link.latency < 1e-3)


def test_files_are_named_like_their_devices():
    assert [entry.name for entry in ENTRIES] == names("hardware")


def test_no_two_devices_share_a_name_or_alias():
    known = Counter(name for entry in ENTRIES for name in {one.lower() for one in (entry.name, *entry.aliases)})
    assert [name for name, count in known.items() if count > 1] == []


def test_unknown_device_is_refused_with_those_there_are():
    with pytest.raises(InputError, match=r"'abacus'.*h100-sxm.*rtx-4090") as caught:
        find_hardware_entry("abacus")
    assert caught.value.field == "hardware"
