"""Projections: everything lies where its millimetres say."""

import numpy as np
import pytest

from ct_volumes import page
from ct_volumes.projections import LONGER_SIDE, project

from .page_samples import SPACING, lesion, scan


@pytest.mark.parametrize("place", [(1, 20, 30), (8, 100, 140), (16, 60, 11), (22, 5, 75)])
def test_markers_lie_on_what_is_bright_in_the_projections(place):
    """A bright block of one slice, 3 x 3 pixels, alone in the air."""
    hu = np.full((24, 120, 150), -1000, np.int16)
    k, y, x = place
    hu[k, y - 1 : y + 2, x - 1 : x + 2] = 3000
    volume = scan(hu, tilt=0.2)
    own = lesion(volume, k, k, (x, y), 0.95)
    views = project(volume)
    assert max(max(view.grey.shape) for view in views.values()) == LONGER_SIDE
    for view in views.values():
        assert view.grey.shape[0] * view.pixel_mm == pytest.approx(
            volume.extent_mm.sum(), abs=view.pixel_mm
        )
        rows, columns = np.nonzero(view.grey > 128)
        left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
        mark = page._mark(own, volume, view)
        x1, y1, x2, y2 = mark["box"]
        assert (top, bottom) == pytest.approx((y1, y2), abs=1.01)
        # The box ends at pixel centres, brightness half a pixel or more beyond.
        spread = max(SPACING) / view.pixel_mm + 1
        assert (left, right) == pytest.approx((x1, x2), abs=spread)
        assert mark["centre"] == pytest.approx(((left + right) / 2, (top + bottom) / 2), abs=1)
        assert page._picture(view, volume)["levels"][k] == pytest.approx(
            mark["centre"][1], abs=0.02
        )


def test_gaps_of_the_scan_are_black():
    """Two bright parts of 12 mm, 23 mm between them."""
    volume = scan(np.full((24, 120, 150), 3000, np.int16), 0.0, [1.0] * 11 + [24.0] + [1.0] * 12)
    for view in project(volume).values():
        middle = view.grey[:, view.grey.shape[1] // 2]
        bright = [(middle[a:b] == 255).mean() for a, b in (rows(view, 0, 12), rows(view, 35, 47))]
        assert min(bright) > 0.9
        assert (middle[slice(*rows(view, 13, 34))] == 0).all()


def rows(view, first_mm, last_mm):
    return round(first_mm / view.pixel_mm), round(last_mm / view.pixel_mm)
