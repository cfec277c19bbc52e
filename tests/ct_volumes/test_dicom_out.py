"""DICOM SEG and SR of sources that these tests write: the checkers of dicom3tools find no error,
and pydicom, highdicom and dcmqi read the same millimetres."""

import subprocess
from dataclasses import replace

import highdicom
import numpy as np
import pydicom
import pytest

from ct_volumes.lesions import Lesion, LesionSlice, Patch
from ct_volumes.seg_out import write_seg
from ct_volumes.sr_out import write_sr
from deeplesion.data.recist import recist_from_mask

from .dicom_sources import (
    ALGORITHM,
    BIN,
    ORIENTATIONS,
    SHAPE,
    check,
    check_together,
    items,
    lesion_places,
    lesions,
    seg_places,
    source_volume,
    tid1500,
)

CASES = {
    **{f"orientation{n}": each for n, each in enumerate(ORIENTATIONS)},
    "uneven": dict(steps=(2.5, 2.5, 6.0, 2.5, 2.5)),
    "tilted": dict(shift=0.3),
    "multi-frame": dict(frames=True),
    "multi-frame turned": dict(frames=True, axes=(0, 2, 1), flipped=(False, True, False)),
}


# Of the orientations two are enough for the programs that run outside.
FEW = ["orientation0", "orientation5", "uneven", "tilted", "multi-frame", "multi-frame turned"]
EVEN_ONES = [name for name in FEW if name not in ("uneven", "tilted")]
few = pytest.mark.parametrize("case", FEW, indirect=True)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A volume, its lesions, and what was written of them."""
    name, options = request.param, CASES[request.param]
    folder = tmp_path_factory.mktemp("case")
    volume = source_volume(folder / "scan", **options)
    found = lesions(volume)
    assert write_seg(folder / "seg.dcm", found, volume, ALGORITHM)
    write_sr(folder / "sr.dcm", found, volume, ALGORITHM, seg=folder / "seg.dcm")
    return name, folder, volume, found


def test_seg_holds_every_voxel_where_it_is(case):
    _, folder, volume, found = case
    seg = pydicom.dcmread(folder / "seg.dcm")
    places = seg_places(seg)
    assert list(places) == [1, 2]
    for number, lesion in enumerate(found, 1):
        assert places[number] == lesion_places(volume, lesion)
    assert seg.SegmentsOverlap == "YES"
    assert seg.NumberOfFrames == sum(len(lesion.slices) for lesion in found)
    (measures,) = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    assert measures.SliceThickness == 3.0  # of the source, whose slices lie 2.5 mm apart


def test_slices_of_unknown_thickness_are_as_thick_as_they_lie_apart(tmp_path):
    volume = source_volume(tmp_path / "scan")
    volume = replace(volume, source=replace(volume.source, slice_thickness_mm=None))
    assert write_seg(tmp_path / "seg.dcm", lesions(volume), volume, ALGORITHM)
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    (measures,) = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    assert measures.SliceThickness == measures.SpacingBetweenSlices == 2.5


@few
def test_dicom_checkers_find_no_error(case):
    name, folder, _, _ = case
    for path in ("seg.dcm", "sr.dcm"):
        check(folder / path)
    if "multi-frame" not in name:  # dcentvfy would judge the tests' own enhanced file
        scan = sorted((folder / "scan").iterdir())
        check_together([folder / "seg.dcm", folder / "sr.dcm", *scan])


def value(item):
    return float(item.MeasuredValueSequence[0].NumericValue)


def test_sr_points_lie_on_the_right_image_in_the_same_millimetres(case):
    """SCOORD to mm by the header of the image that it names."""
    _, folder, volume, found = case
    headers = {}
    for path in (folder / "scan").iterdir():
        header = pydicom.dcmread(path, stop_before_pixels=True)
        headers[header.SOPInstanceUID] = header
    report = pydicom.dcmread(folder / "sr.dcm")
    groups = [g for g in items(report, "Measurement Group") if list(items(g, "Long axis"))]
    assert len(groups) == len(found)
    for group, lesion in zip(groups, found, strict=True):
        truth = volume.to_world(*lesion.recist.T, lesion.recist_index)
        for name, ends, length in zip(
            ("Long axis", "Short axis"), (truth[:2], truth[2:]), lesion.diameters_mm
        ):
            (axis,) = items(group, name)
            assert value(axis) == pytest.approx(length, rel=1e-5)
            (scoord,) = (i for i in items(axis) if i.ValueType == "SCOORD")
            (image,) = (i for i in items(scoord) if i.ValueType == "IMAGE")
            places = scoord_places(scoord, image.ReferencedSOPSequence[0], headers)
            np.testing.assert_allclose(places, ends, atol=1e-3)
            assert np.linalg.norm(places[1] - places[0]) == pytest.approx(length, abs=1e-3)


def scoord_places(scoord, reference, headers):
    header = headers[reference.ReferencedSOPInstanceUID]
    assert reference.ReferencedSOPClassUID == header.SOPClassUID
    plane = position = measures = header
    if "NumberOfFrames" in header:
        frame = header.PerFrameFunctionalGroupsSequence[reference.ReferencedFrameNumber - 1]
        plane, position = frame.PlaneOrientationSequence[0], frame.PlanePositionSequence[0]
        measures = header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    right, down = np.reshape(np.array(plane.ImageOrientationPatient, float), (2, 3))
    column, row = (np.reshape(scoord.GraphicData, (-1, 2)) - 0.5).T[:, :, None]
    rows, columns = map(float, measures.PixelSpacing)
    origin = np.array(position.ImagePositionPatient, float)
    return origin + column * columns * right + row * rows * down


@few
def test_highdicom_reads_the_same_lesions(case):
    _, folder, _, found = case
    report = highdicom.sr.srread(folder / "sr.dcm")
    seg = pydicom.dcmread(folder / "seg.dcm")
    uids = [segment.TrackingUID for segment in seg.SegmentSequence]
    planar = report.content.get_image_measurement_groups()
    solid = report.content.get_volumetric_roi_measurement_groups()
    assert [group.tracking_uid for group in planar] == uids and len(set(uids)) == len(found)
    assert [group.tracking_uid for group in solid] == uids
    for number, (flat, group, lesion) in enumerate(zip(planar, solid, found, strict=True), 1):
        (volume_mm3,) = group.get_measurements()
        assert volume_mm3.value == pytest.approx(lesion.volume_mm3, rel=1e-5)
        assert volume_mm3.unit.value == "mm3"
        names = [m.name.meaning for m in flat.get_measurements()]
        assert names == ["Long axis", "Short axis", "Detection score"]
        assert flat.get_measurements()[-1].value == lesion.score
        assert (
            flat.finding_type
            == group.finding_type
            == highdicom.sr.CodedConcept("52988006", "SCT", "Lesion")
        )
        (segment,) = (i for i in group[0].ContentSequence if i.ValueType == "IMAGE")
        (reference,) = segment.ReferencedSOPSequence
        assert reference.ReferencedSOPInstanceUID == seg.SOPInstanceUID
        assert reference.ReferencedSegmentNumber == number


@few
def test_both_files_name_the_algorithm_and_that_it_is_research(case):
    _, folder, _, _ = case
    seg = pydicom.dcmread(folder / "seg.dcm")
    for segment in seg.SegmentSequence:
        (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == (
            "alignshift_3slice", "0.1.0",
        )  # fmt: skip
        assert "ab" * 32 in algorithm.AlgorithmParameters
        assert "not a medical device" in segment.SegmentDescription
    report = pydicom.dcmread(folder / "sr.dcm")
    groups = list(items(report, "Measurement Group"))
    for group in groups:
        texts = [i.TextValue for i in items(group, "Algorithm Parameters")]
        assert texts == ["checkpoint_sha256=" + "ab" * 32, "interval_mm=2.0", "fp=null"]
    (note,) = items(report, "Comment")
    assert "not a medical device" in note.TextValue
    for each in (seg, report):
        assert "not a medical device" in each.SeriesDescription
        assert each.PatientName == "Müller^Jürgen" and each.PatientID == "PAT-4711"
    assert report.VerificationFlag == "UNVERIFIED"
    assert report.PreliminaryFlag == "PRELIMINARY"


@few
def test_tid1500reader_reads_the_same(case):
    _, folder, _, found = case
    content = tid1500(folder / "sr.dcm")
    measured = {}
    for group in content["Measurements"]:
        for item in group["measurementItems"]:
            key = group["TrackingIdentifier"], item["quantity"]["CodeMeaning"]
            assert key not in measured
            measured[key] = float(item["value"]), item["units"]["CodeValue"]
    truth = {}
    for number, lesion in enumerate(found, 1):
        name = f"Lesion {number}"
        truth[name, "Long axis"] = lesion.diameters_mm[0], "mm"
        truth[name, "Short axis"] = lesion.diameters_mm[1], "mm"
        truth[name, "Volume"] = lesion.volume_mm3, "mm3"
        truth[name, "Detection score"] = lesion.score, "1"
    assert measured.keys() == truth.keys()
    for key, (number, unit) in truth.items():
        assert measured[key] == (pytest.approx(number, rel=1e-5), unit)
    segments = [g["ReferencedSegment"] for g in content["Measurements"] if "ReferencedSegment" in g]
    assert segments == [1, 2] and len(content["Measurements"]) == 4


@pytest.mark.parametrize("case", EVEN_ONES, indirect=True)
def test_segimage2itkimage_reads_the_same_voxels(case, tmp_path):
    """Where an ITK image can hold them at all: evenly spaced slices at right angles."""
    nibabel = pytest.importorskip("nibabel")
    _, folder, volume, found = case
    command = [BIN / "segimage2itkimage", "--inputDICOM", folder / "seg.dcm"]
    command += ["--outputDirectory", tmp_path, "--outputType", "nifti"]
    subprocess.run(command, check=True, capture_output=True)
    for number, lesion in enumerate(found, 1):
        image = nibabel.load(tmp_path / f"{number}.nii.gz")
        voxels = np.argwhere(np.asarray(image.dataobj) == number)
        places = nibabel.affines.apply_affine(image.affine, voxels) * (-1, -1, 1)
        truth = lesion_places(volume, lesion)
        assert len(places) == len(truth)
        order = np.lexsort(np.round(places, 1).T), np.lexsort(np.round(truth, 1).T)
        np.testing.assert_allclose(places[order[0]], np.array(truth)[order[1]], atol=0.02)


def test_one_lesion_on_one_slice(tmp_path):
    """With a single segment its number stands elsewhere in the file."""
    volume = source_volume(tmp_path / "scan", shape=(1, *SHAPE[1:]))
    mask = np.zeros(SHAPE[1:], bool)
    mask[3:9, 4:8] = True
    measured = recist_from_mask(mask, 0.5)
    each = LesionSlice(0, np.array([4.0, 3, 7, 8]), 0.5, Patch.of(mask))
    lesion = Lesion(
        0.5, (each,), 28.8, np.zeros(3), measured.recist, 0, measured.lengths_mm
    )  # fmt: skip
    write_seg(tmp_path / "seg.dcm", [lesion], volume, ALGORITHM)
    write_sr(tmp_path / "sr.dcm", [lesion], volume, ALGORITHM, seg=tmp_path / "seg.dcm")
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert seg_places(seg) == {1: lesion_places(volume, lesion)}
    assert seg.SegmentsOverlap == "NO"
    for path in ("seg.dcm", "sr.dcm"):
        check(tmp_path / path)
    assert len(tid1500(tmp_path / "sr.dcm")["Measurements"]) == 2


def test_without_a_seg_one_group_holds_everything(tmp_path):
    volume = source_volume(tmp_path / "scan")
    found = lesions(volume)
    write_sr(tmp_path / "sr.dcm", found, volume, ALGORITHM)
    check(tmp_path / "sr.dcm")
    groups = tid1500(tmp_path / "sr.dcm")["Measurements"]
    assert len({g["TrackingUniqueIdentifier"] for g in groups}) == len(groups) == 2
    for group, lesion in zip(groups, found, strict=True):
        values = [float(item["value"]) for item in group["measurementItems"]]
        expected = [lesion.volume_mm3, *lesion.diameters_mm, lesion.score]
        np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_no_lesions_are_no_seg_and_a_report_that_says_so(tmp_path):
    volume = source_volume(tmp_path / "scan")
    assert write_seg(tmp_path / "seg.dcm", [], volume, ALGORITHM) is False
    write_sr(tmp_path / "sr.dcm", [], volume, ALGORITHM, seg=tmp_path / "seg.dcm")
    assert {p.name for p in tmp_path.iterdir()} == {"scan", "sr.dcm"}
    check(tmp_path / "sr.dcm")
    (group,) = tid1500(tmp_path / "sr.dcm")["Measurements"]
    (said,) = group["qualitativeEvaluations"]
    assert said["conceptValue"]["CodeMeaning"] == "All algorithms succeeded; without findings"
    assert not group["measurementItems"]


def test_an_end_point_at_the_border_stays_on_the_image(tmp_path):
    volume = source_volume(tmp_path / "scan")
    recist = np.array([[-0.5, 3], [29.5, 3], [4, -0.5], [4, 20.5]])
    lesion = lesions(volume)[0]
    object.__setattr__(lesion, "recist", recist)
    write_sr(tmp_path / "sr.dcm", [lesion], volume, ALGORITHM)
    report = pydicom.dcmread(tmp_path / "sr.dcm")
    points = [i.GraphicData for i in items(report) if i.ValueType == "SCOORD"]
    assert points == [[0, 3.5, 30, 3.5], [4.5, 0, 4.5, 21]]
    object.__setattr__(lesion, "recist", recist * 1.1 - 0.3)  # as a tilted outline may be
    write_sr(tmp_path / "sr.dcm", [lesion], volume, ALGORITHM)
    report = pydicom.dcmread(tmp_path / "sr.dcm")
    points = [i.GraphicData for i in items(report) if i.ValueType == "SCOORD"]
    assert np.min(points) == 0 and points[0][2] == 30 and points[1][3] == 21


@pytest.mark.parametrize("case", ["orientation7", "tilted", "multi-frame turned"])
def test_of_a_scan_that_was_read(tmp_path, case):
    """The reader and these tests, written apart, mean the same by a volume."""
    from ct_volumes.read import read_volume

    told = source_volume(tmp_path / "scan", **CASES[case])
    volume = read_volume(tmp_path / "scan")
    found = lesions(volume)
    write_seg(tmp_path / "seg.dcm", found, volume, ALGORITHM)
    places = seg_places(pydicom.dcmread(tmp_path / "seg.dcm"))
    assert [places[n] for n in (1, 2)] == [lesion_places(told, each) for each in found]


@pytest.mark.parametrize("steps, stated", [((2.5,) * 5, 2.5), ((2.5, 2.5, 6.0, 2.5, 2.5), None)])
def test_the_interval_is_the_scans_not_that_of_the_slices_with_lesions(tmp_path, steps, stated):
    volume = source_volume(tmp_path / "scan", steps=steps)
    first = lesions(volume)[0]
    found = []
    for index in (0, 4):
        only = LesionSlice(index, first.slices[0].bbox, 0.5, first.slices[0].patch)
        found.append(Lesion(0.5, (only,), 1.0, np.zeros(3), first.recist, index, np.ones(2)))
    write_seg(tmp_path / "seg.dcm", found, volume, ALGORITHM)
    shared = pydicom.dcmread(tmp_path / "seg.dcm").SharedFunctionalGroupsSequence[0]
    assert shared.PixelMeasuresSequence[0].get("SpacingBetweenSlices") == stated
