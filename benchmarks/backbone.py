"""Backbone and neck at inference: ours against the papers' way, benchmarks/plain.py."""

from __future__ import annotations

from benchmarks import plain
from benchmarks.measure import Case

# fusion, slices, image size, batch: the papers' settings, then how cost grows.
SETTINGS = (
    ("AlignShiftConv", 7, 512, 1),
    ("A3DConv", 7, 512, 1),
    ("AlignShiftConv", 3, 512, 1),
    ("A3DConv", 3, 512, 1),
    ("AlignShiftConv", 5, 512, 1),
    ("AlignShiftConv", 9, 512, 1),
    ("AlignShiftConv", 7, 256, 1),
    ("AlignShiftConv", 7, 256, 2),
    ("AlignShiftConv", 7, 256, 4),
)


def cases(settings: tuple = SETTINGS) -> list[Case]:
    """One case a setting (fusion operator, slices, image size, batch)."""
    return [_case(*setting) for setting in settings]


def _case(fusion: str, slices: int, size: int, batch: int) -> Case:
    backbone, neck = plain.build(fusion, slices)
    backbone.eval(), neck.eval()
    images, thickness = plain.volumes(batch, slices, size)

    ours = plain.at_inference(lambda: neck(backbone.maps(images, thickness))[0])
    baseline = plain.at_inference(lambda: plain.network(backbone, neck, images, thickness))
    name = f"{fusion} {slices} x {size} x {size}, batch {batch}"
    return Case(name, ours, baseline, plain.close, memory=True)
