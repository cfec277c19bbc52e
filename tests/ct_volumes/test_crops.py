"""Crops: room around each lesion, and no more voxels than a page may hold."""

import numpy as np
import pytest

from ct_volumes import crops
from ct_volumes.crops import crop_lesions

from .page_samples import SPACING, lesion, scan, some_lesions


@pytest.fixture(scope="module")
def volume():
    return scan()


@pytest.fixture(scope="module")
def lesions(volume):
    return some_lesions(volume)


def check_room(own, crop, volume, margin):
    """`margin` mm on either side, or as far as the slice goes; so many pixels may be left out."""
    for start, count, low, high, spacing, size in (
        (crop.x, crop.width, own.box[0], own.box[3], SPACING[1], volume.hu.shape[2]),
        (crop.y, crop.height, own.box[1], own.box[4], SPACING[0], volume.hu.shape[1]),
    ):
        end = start + (count - 1) * crop.stride
        assert start >= 0 and end < size
        assert start == 0 or (low - start) * spacing > margin - spacing
        gap = crop.stride * spacing
        assert size - 1 - end < crop.stride or (end - high) * spacing > margin - gap


def test_few_lesions_have_much_room(volume, lesions):
    for own, crop in zip(lesions, crop_lesions(lesions, volume), strict=True):
        assert (crop.stride, crop.every) == (1, 1)
        check_room(own, crop, volume, 50)
        away = volume.positions_mm[:, None] - volume.positions_mm[[own.first, own.last]]
        near = (away[:, 0] >= -15) & (away[:, 1] <= 15)
        assert set(np.flatnonzero(near)) == set(crop.slices)


def test_thick_slices_have_neighbours_all_the_same(lesions):
    volume = scan(steps=[20.0] * 23)
    crop = crop_lesions(lesions[:1], volume)[0]
    assert crop.slices == tuple(range(8, 17))


def test_a_crop_is_what_it_says(volume):
    crop = crops.Crop(3, 5, 7, 9, (2, 4), stride=3)
    expected = volume.hu[[2, 4], 5:32:3, 3:24:3]
    assert crop.voxels == expected.size == 2 * 7 * 9
    assert (crop.of(volume.hu) == expected).all()


@pytest.mark.parametrize("page_limit", [400_000, 100_000, 20_000, 3_000])
@pytest.mark.parametrize("lesion_limit", [200_000, 9_000])
def test_crops_keep_to_the_limits(volume, lesions, page_limit, lesion_limit, monkeypatch):
    monkeypatch.setattr(crops, "PAGE_VOXELS", page_limit)
    monkeypatch.setattr(crops, "LESION_VOXELS", lesion_limit)
    found = crop_lesions(lesions, volume)
    for own, crop in zip(lesions, found, strict=True):
        check_room(own, crop, volume, 20)
        ends = {own.first, own.last, own.recist_index, own.best.index}
        assert ends <= set(crop.slices) and list(crop.slices) == sorted(set(crop.slices))
        # Slices that must stay may be beyond the limit.
        plane = crop.width * crop.height
        assert crop.voxels <= lesion_limit + 5 * plane
    assert sum(crop.voxels for crop in found) <= page_limit + sum(
        5 * crop.width * crop.height for crop in found
    )
    if page_limit == 3_000:
        assert all(crop.stride > 1 for crop in found)


def test_a_small_lesion_is_whole_beside_a_large_one(volume, monkeypatch):
    small, large = lesion(volume, 4, 5, (20, 20), 2), lesion(volume, 2, 20, (75, 60), 30)
    narrowest = crops.MARGINS_MM[-1]
    sizes = [crops._crop(own, volume, *narrowest).voxels for own in (small, large)]
    monkeypatch.setattr(crops, "PAGE_VOXELS", sum(sizes) - 1)
    kept, thinned = crop_lesions([small, large], volume)
    assert kept.voxels == sizes[0] and kept.every == 1
    assert sizes[1] / 3 < thinned.voxels < sizes[1] and thinned.every == 2


def test_no_lesions_no_crops(volume):
    assert crop_lesions([], volume) == []
