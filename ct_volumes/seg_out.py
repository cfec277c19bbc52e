"""Lesions as a DICOM SEG, one segment a lesion, on the pixels of the images that they were found
in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import highdicom
import numpy as np
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from ct_volumes.dicom_out import (
    ABNORMAL,
    DESCRIPTION,
    LESION,
    MANUFACTURER,
    SEG_SERIES,
    algorithm_parameters,
    is_multiframe,
    new_object,
    plane_in_source,
    refusals_explained,
    save,
    short_text,
    source_headers,
)
from ct_volumes.gaps import gaps
from ct_volumes.lesions import Algorithm, Lesion
from ct_volumes.volume import CTVolume
from deeplesion.errors import DataError

EVEN_TOLERANCE_MM = 0.01


def write_seg(
    path: Path, lesions: Sequence[Lesion], volume: CTVolume, algorithm: Algorithm
) -> bool:
    """Writes a binary segmentation (PS3.3, A.51); segment n is lesion n of the order given.

    Lesions may overlap: every segment holds the whole mask. Frames without a lesion are left out.
    Tracking identifier and UID of each segment are those of the lesion in an SR written after it.

    Returns:
        Whether there is a file: none without lesions, for a SEG must have a segment.

    Raises:
        DataError: the scan is not DICOM, or not of images that a SEG can refer to.
    """
    if not lesions:
        return False
    slices = sorted({each.index for lesion in lesions for each in lesion.slices})
    headers, character_set = source_headers(volume, slices)
    if is_multiframe(volume):
        if len(headers) > 1:
            raise DataError(
                f"{volume.source.path} is a volume of several multi-frame files: a SEG can be"
                " written of one. The NIfTI label map has the masks"
            )
        _share_geometry(headers[0], volume)
        planes = int(headers[0].NumberOfFrames)
        plane_of = {index: volume.source.instances[index].frame for index in slices}
    else:
        planes = len(slices)
        plane_of = {index: plane for plane, index in enumerate(slices)}

    # highdicom takes one label a pixel, or an array of images times lesions. The first cannot hold
    # lesions that overlap, the second takes gigabytes. So it gets one marked pixel for each frame
    # that there is to be, builds the header by them, and the pixels are put in afterwards.
    rows, columns = volume.source.shape[1:]
    marks = np.zeros((planes, rows * columns), np.uint16)
    used = np.zeros(planes, int)
    for number, lesion in enumerate(lesions, 1):
        for each in lesion.slices:
            plane = plane_of[each.index]
            marks[plane, used[plane]] = number
            used[plane] += 1
    segments = [_segment(number, each, algorithm) for number, each in enumerate(lesions, 1)]
    with refusals_explained(volume):
        seg = highdicom.seg.Segmentation(
            source_images=headers,
            pixel_array=marks.reshape(planes, rows, columns),
            segmentation_type="BINARY",
            segment_descriptions=segments,
            **new_object(SEG_SERIES, algorithm),
            content_label="LESIONS",
            content_description=DESCRIPTION,
        )
    # highdicom takes the source's, and the distance of the slices that hold lesions.
    seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence = _pixel_measures(volume)
    seg.SegmentsOverlap = "YES" if _overlap(lesions, volume) else "NO"
    seg.PixelData = _pixels(seg, lesions, volume, {p: i for i, p in plane_of.items()})
    save(path, seg, character_set)
    return True


def _segment(number: int, lesion: Lesion, algorithm: Algorithm) -> Dataset:
    segment = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=f"Lesion {number}",
        segmented_property_category=ABNORMAL,
        segmented_property_type=LESION,
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=short_text(algorithm.name),
            family=codes.DCM.ArtificialIntelligence,
            version=short_text(algorithm.version),
            source=MANUFACTURER,
            parameters=algorithm_parameters(algorithm),
        ),
        tracking_uid=highdicom.UID(),
        tracking_id=f"Lesion {number}",
        display_color=_colour(number),
    )
    segment.SegmentDescription = f"Score {lesion.score:.3f}. Research, not a medical device"
    return segment


def _colour(number: int) -> highdicom.color.CIELabColor:
    """Hues a golden angle apart, so that neighbouring numbers differ."""
    angle = number * np.pi * (3 - np.sqrt(5))
    return highdicom.color.CIELabColor(65.0, 60 * np.cos(angle), 60 * np.sin(angle))


def _pixel_measures(volume: CTVolume) -> highdicom.PixelMeasuresSequence:
    spacing = volume.spacing_mm
    if volume.source.axes[1] > volume.source.axes[2]:
        spacing = spacing[::-1]
    intervals = volume.extent_mm
    interval = float(np.median(intervals))
    even = np.ptp(intervals) <= EVEN_TOLERANCE_MM and not gaps(volume.positions_mm).any()
    return highdicom.PixelMeasuresSequence(
        pixel_spacing=spacing,
        slice_thickness=volume.source.slice_thickness_mm or interval,
        spacing_between_slices=interval if even else None,
    )


def _share_geometry(header: Dataset, volume: CTVolume) -> None:
    """highdicom wants pixels and orientation of a multi-frame file among what its frames share."""
    directions = np.stack([volume.row_direction, volume.column_direction])
    _, flip_rows, flip_columns = volume.source.flipped
    directions *= [[-1 if flip_columns else 1], [-1 if flip_rows else 1]]
    if volume.source.axes[1] > volume.source.axes[2]:
        directions = directions[::-1]
    if not header.get("SharedFunctionalGroupsSequence"):
        header.SharedFunctionalGroupsSequence = [Dataset()]
    shared = header.SharedFunctionalGroupsSequence[0]
    shared.PixelMeasuresSequence = _pixel_measures(volume)
    shared.PlaneOrientationSequence = highdicom.PlaneOrientationSequence(
        "PATIENT", directions.ravel().tolist()
    )


def _overlap(lesions: Sequence[Lesion], volume: CTVolume) -> bool:
    pairs = itertools.groupby(
        sorted(((s.index, n) for n, each in enumerate(lesions) for s in each.slices)),
        key=lambda pair: pair[0],
    )
    for index, numbers in pairs:
        count = np.zeros(volume.hu.shape[1:], np.uint16)
        for _, n in numbers:
            mask = np.zeros(count.shape, np.uint16)
            lesions[n].slices[index - lesions[n].first].patch.paint(mask, 1)
            count += mask
        if count.max() > 1:
            return True
    return False


def _pixels(
    seg: Dataset, lesions: Sequence[Lesion], volume: CTVolume, slice_of: dict[int, int]
) -> bytes:
    """PixelData: the masks of the frames in the order of the header, 1 bit a pixel."""
    packed = []
    frames = _frames(seg, slice_of, volume)
    # Frames follow each other bit by bit: eight of them fill whole bytes whatever their size.
    while several := list(itertools.islice(frames, 8)):
        planes = np.zeros((len(several), *volume.source.shape[1:]), bool)
        for plane, (number, index) in zip(planes, several):
            mask = np.zeros(volume.hu.shape[1:], bool)
            lesion = lesions[number - 1]
            lesion.slices[index - lesion.first].patch.paint(mask)
            plane[:] = plane_in_source(volume, mask)
        packed.append(np.packbits(planes, bitorder="little").tobytes())
    data = b"".join(packed)
    return data + bytes(len(data) % 2)


def _frames(seg: Dataset, slice_of: dict[int, int], volume: CTVolume) -> Iterator[tuple[int, int]]:
    """The number of the segment and the slice of the volume of each frame."""
    instances = {volume.source.instances[i].uid: i for i in slice_of.values()}
    shared = seg.SharedFunctionalGroupsSequence[0]
    for frame in seg.PerFrameFunctionalGroupsSequence:
        # With a single segment its number stands among what frames share.
        where = frame if "SegmentIdentificationSequence" in frame else shared
        number = where.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        image = frame.DerivationImageSequence[0].SourceImageSequence[0]
        if is_multiframe(volume):
            yield number, slice_of[int(image.ReferencedFrameNumber) - 1]
        else:
            yield number, instances[image.ReferencedSOPInstanceUID]
