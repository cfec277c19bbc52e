"""Lesions as a DICOM structured report, template TID 1500: measurements with their places on the
images, for workstations and archives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import highdicom
import numpy as np
import pydicom
from highdicom import sr
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from ct_volumes.dicom_out import (
    ABNORMAL,
    LESION,
    MANUFACTURER,
    SR_SERIES,
    algorithm_parameters,
    image_points,
    new_object,
    refusals_explained,
    save,
    short_text,
    source_headers,
)
from ct_volumes.lesions import Algorithm, Lesion
from ct_volumes.volume import CTVolume
from deeplesion.errors import DataError

NOTE = "Found by software for research. It is not a medical device: not for diagnosis."
SCORE = Code("score", "99DEEPLESION", "Detection score")
SUMMARY = Code("111017", "DCM", "CAD Processing and Findings Summary")
NO_FINDINGS = Code("111241", "DCM", "All algorithms succeeded; without findings")


def write_sr(
    path: Path,
    lesions: Sequence[Lesion],
    volume: CTVolume,
    algorithm: Algorithm,
    seg: Path | None = None,
) -> None:
    """Writes a Comprehensive SR (TID 1500) with a measurement group (TID 1501) a lesion.

    Each has the tracking identifier 'Lesion n' and UID, the finding (lesion), long and short axis
    in mm, their end points (SCOORD) on the image of RECIST, the volume in mm3 and the score. With
    a SEG the volume stands in a second group (TID 1411) of the same tracking UID that refers to the
    segment; only there the standard has a place for it. Without lesions there is one group that
    says so.

    Args:
        seg: what `write_seg` wrote of the same lesions.

    Raises:
        DataError: the scan is not DICOM, or `seg` is not the SEG of these lesions.
    """
    segmentation = None
    if seg is not None and lesions:
        segmentation = _read_seg(Path(seg), len(lesions))
    headers, character_set = source_headers(volume, [each.recist_index for each in lesions] or [0])
    by_uid = {header.SOPInstanceUID: header for header in headers}
    groups = []
    for number, lesion in enumerate(lesions, 1):
        image = by_uid[volume.source.instances[lesion.recist_index].uid]
        groups += _groups(number, lesion, volume, algorithm, image, segmentation)
    if not lesions:
        groups = [
            sr.MeasurementsAndQualitativeEvaluations(
                tracking_identifier=sr.TrackingIdentifier(highdicom.UID(), "No lesions"),
                algorithm_id=_algorithm(algorithm),
                qualitative_evaluations=[sr.QualitativeEvaluation(SUMMARY, NO_FINDINGS)],
            )
        ]
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(
            observer_device_context=sr.ObserverContext(
                observer_type=codes.DCM.Device,
                observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
                    uid=highdicom.UID(),
                    name=short_text(f"{algorithm.name} {algorithm.version}"),
                    manufacturer_name=MANUFACTURER,
                    model_name=short_text(algorithm.name),
                    serial_number=short_text(algorithm.checkpoint_sha256),
                ),
            )
        ),
        procedure_reported=codes.LN.CTUnspecifiedBodyRegion,
        imaging_measurements=groups,
    )
    report[0].ContentSequence.append(
        sr.TextContentItem(codes.DCM.Comment, NOTE, relationship_type="CONTAINS")
    )
    with refusals_explained(volume):
        document = sr.ComprehensiveSR(
            evidence=[*headers, *([segmentation] if segmentation is not None else [])],
            content=report,
            **new_object(SR_SERIES, algorithm),
            coding_schemes=[
                CodingSchemeIdentificationItem(
                    designator=SCORE.scheme_designator, name=f"Codes of {MANUFACTURER}"
                )
            ],
            is_complete=True,
            is_final=False,
            is_verified=False,
        )
    save(path, document, character_set)


def _groups(
    number: int,
    lesion: Lesion,
    volume: CTVolume,
    algorithm: Algorithm,
    image: Dataset,
    segmentation: Dataset | None,
) -> list[sr.MeasurementsAndQualitativeEvaluations]:
    frame = volume.source.instances[lesion.recist_index].frame
    frames = None if frame is None else [frame + 1]
    points = image_points(volume, np.asarray(lesion.recist, np.float64), lesion.recist_index)
    source = sr.SourceImageForRegion(image.SOPClassUID, image.SOPInstanceUID, frames)
    axes = [
        sr.Measurement(
            name=name,
            value=_number(length),
            unit=codes.UCUM.Millimeter,
            referenced_coordinates=[
                sr.CoordinatesForMeasurement("POLYLINE", ends, source_image=source)
            ],
        )
        for name, length, ends in (
            (codes.SCT.LongAxis, lesion.diameters_mm[0], points[:2]),
            (codes.SCT.ShortAxis, lesion.diameters_mm[1], points[2:]),
        )
    ]
    size = sr.Measurement(codes.SCT.Volume, _number(lesion.volume_mm3), codes.UCUM.CubicMillimeter)
    score = sr.Measurement(SCORE, _number(lesion.score), codes.UCUM.NoUnits)
    uid = highdicom.UID()
    if segmentation is not None:
        uid = highdicom.UID(segmentation.SegmentSequence[number - 1].TrackingUID)
    common = dict(
        tracking_identifier=sr.TrackingIdentifier(uid, f"Lesion {number}"),
        finding_type=LESION,
        finding_category=ABNORMAL,
        algorithm_id=_algorithm(algorithm),
    )
    in_plane = [*axes, score] if segmentation is not None else [size, *axes, score]
    groups = [sr.MeasurementsAndQualitativeEvaluations(measurements=in_plane, **common)]
    if segmentation is not None:
        # Not by ReferencedSegment.from_segmentation, which fails if there is one segment.
        segment = sr.ReferencedSegment(
            segmentation.SOPClassUID,
            segmentation.SOPInstanceUID,
            number,
            source_series=sr.SourceSeriesForSegmentation(image.SeriesInstanceUID),
        )
        groups.append(
            sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
                referenced_segment=segment, measurements=[size], **common
            )
        )
    return groups


def _algorithm(algorithm: Algorithm) -> sr.AlgorithmIdentification:
    parameters = [f"{name}={value}" for name, value in algorithm_parameters(algorithm).items()]
    return sr.AlgorithmIdentification(
        short_text(algorithm.name), short_text(algorithm.version), parameters
    )


def _number(value: float) -> float:
    """As many digits as DICOM's decimal strings have room for."""
    return float(f"{float(value):.6g}")


def _read_seg(path: Path, count: int) -> Dataset:
    try:
        seg = pydicom.dcmread(path, stop_before_pixels=True)
        segments = len(seg.SegmentSequence)
    except Exception as error:  # pydicom raises many kinds
        raise DataError(f"{path} is not a DICOM SEG: {error}") from None
    if segments != count:
        raise DataError(f"{path} has {segments} segments, the report {count} lesions")
    return seg
