"""Where an image's tensors go: addresses in the devices' regions and places in the file.

Every device runs one program, so a tensor has one address on all devices: its slot is as long as its longest shard,
rounded up to the alignment. A region is the concatenation of its slots in plan order, and a region is one
contiguous slice of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from typebar.isa.errors import TypebarError
from typebar.isa.instructions import Region
from typebar.isa.machine import LINE_BYTES, MAX_DEVICES, Machine

PAGE_BYTES = 4096
"""The file's data, every region and every tensor in a region start at a multiple of this many bytes."""
PACKED_REGIONS = (Region.PARAMS, Region.WEIGHTS, Region.LOCAL)
"""Regions whose contents are in the image; KV and IO have only a size."""


class ImageError(TypebarError):
    """An image, or a request to write one, breaks a rule; the message names rule, value and way out."""


@dataclass(frozen=True)
class TensorPlan:
    """One packed tensor to be written: `bytes` is its length without padding, `meta` opaque JSON.

    `device` is None exactly in region PARAMS, which is the same on every device. A tensor of WEIGHTS or LOCAL needs
    one plan for each device, under the same name.
    """

    name: str
    region: Region
    device: int | None
    bytes: int
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AddressMap:
    """Result of `plan_regions`: `lines` and `slots` (bytes) by tensor name, `totals` (bytes) by region."""

    lines: Mapping[str, int]
    slots: Mapping[str, int]
    totals: Mapping[Region, int]


def alignment(machine: Machine) -> int:
    """Bytes that tensors are aligned to: a page, or a row of HBM where that is longer."""
    return max(PAGE_BYTES, machine.row_bytes)


def file_name(plan: TensorPlan) -> str:
    """The tensor's name in the file: `params.NAME`, `device.D.weights.NAME` or `device.D.local.NAME`."""
    if plan.device is None:
        return f"params.{plan.name}"
    return f"device.{plan.device}.{plan.region.name.lower()}.{plan.name}"


def plan_regions(plans: Sequence[TensorPlan], machine: Machine, devices: int) -> AddressMap:
    """Lay the tensors out in their regions, in the order given.

    `lines` are addresses relative to the region in lines of `LINE_BYTES`, the same on every device, and `totals`
    the bytes that each device needs; a region without tensors has 0.

    Raises:
        ImageError: a malformed or repeated name, a region that holds no packed tensors, a negative length, or a
            tensor that is not given for exactly the devices 0 to `devices` - 1.
    """
    if not 1 <= devices <= MAX_DEVICES:
        raise ImageError(f"an image is for 1 to {MAX_DEVICES} devices, not {devices}: choose another number")
    shards: dict[str, dict[int | None, TensorPlan]] = {}
    for plan in plans:
        _check_plan(plan)
        known = shards.setdefault(plan.name, {})
        if plan.device in known or any(other.region is not plan.region for other in known.values()):
            raise ImageError(f"tensor name {plan.name!r} is given twice: names are unique on a device")
        known[plan.device] = plan
    step = alignment(machine)
    lines: dict[str, int] = {}
    slots: dict[str, int] = {}
    totals = dict.fromkeys(PACKED_REGIONS, 0)
    everyone = set(range(devices))
    for name, parts in shards.items():
        region = next(iter(parts.values())).region
        if region is not Region.PARAMS and parts.keys() != everyone:
            wrong = next(iter(parts.keys() ^ everyone))
            raise ImageError(
                f"tensor {name!r} must have one shard on each of {devices} devices; device {wrong} is"
                f" {'missing' if wrong in everyone else 'none of them'}"
            )
        lines[name] = totals[region] // LINE_BYTES
        slots[name] = -(-max(part.bytes for part in parts.values()) // step) * step
        totals[region] += slots[name]
    return AddressMap(lines, slots, totals)


def file_places(plans: Sequence[TensorPlan], addresses: AddressMap, devices: int) -> dict[str, int]:
    """Byte offset of every tensor in the file's data, by its name in the file.

    PARAMS comes first, then WEIGHTS and LOCAL of device 0, of device 1 and so on.
    """
    starts: dict[tuple[Region, int | None], int] = {(Region.PARAMS, None): 0}
    offset = addresses.totals[Region.PARAMS]
    for device in range(devices):
        for region in (Region.WEIGHTS, Region.LOCAL):
            starts[region, device] = offset
            offset += addresses.totals[region]
    return {
        file_name(plan): starts[plan.region, plan.device] + addresses.lines[plan.name] * LINE_BYTES for plan in plans
    }


def _check_plan(plan: TensorPlan) -> None:
    if not plan.name or not plan.name.isprintable() or any(char.isspace() for char in plan.name):
        raise ImageError(f"tensor name {plan.name!r} must be printable, without spaces and not empty")
    if plan.region not in PACKED_REGIONS:
        raise ImageError(
            f"tensor {plan.name!r}: region {plan.region.name} holds no packed tensors, only"
            f" {', '.join(region.name for region in PACKED_REGIONS)} do"
        )
    if (plan.device is None) != (plan.region is Region.PARAMS):
        raise ImageError(
            f"tensor {plan.name!r} in {plan.region.name} has device {plan.device}: PARAMS has none, the others have one"
        )
    if plan.bytes < 0:
        raise ImageError(f"tensor {plan.name!r} has {plan.bytes} bytes: lengths are not negative")
