"""DICOM SEG and SR of sources that these tests write: the checkers of dicom3tools find no error,
and pydicom, highdicom and dcmqi read the same millimetres."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

from ct_volumes.lesions import Algorithm, Lesion, LesionSlice, Patch
from ct_volumes.seg_out import write_seg
from ct_volumes.sr_out import write_sr
from ct_volumes.volume import CTVolume, Instance, Source
from deeplesion.data.recist import recist_from_mask
from deeplesion.errors import DataError, WriteError

BIN = Path(sys.executable).parent
ALGORITHM = Algorithm("alignshift_3slice", "0.1.0", "ab" * 32, {"interval_mm": 2.0, "fp": None})
SHAPE = (6, 21, 30)
EVEN = (2.5,) * 5
SPACING = (0.8, 0.5)

ORIENTATIONS = [
    dict(axes=axes, flipped=(False, rows, columns))
    for axes, rows, columns in itertools.product(
        [(0, 1, 2), (0, 2, 1)], [False, True], [False, True]
    )
]
EMPTY = (
    "PatientID", "PatientBirthDate", "StudyID", "AccessionNumber", "PatientSex", "StudyDate",
    "SliceThickness", "SpecificCharacterSet", "ReferringPhysicianName", "FrameOfReferenceUID",
)  # fmt: skip


def source_volume(
    folder, axes=(0, 1, 2), flipped=(False,) * 3, steps=EVEN, shift=0.0, frames=False,
    change=lambda header: None, shape=SHAPE, turn=0.03,
):  # fmt: skip
    """A volume, and files of its slices whose rows and columns lie as `axes` and `flipped` say."""
    below = np.append(0, np.cumsum(steps))[: shape[0]]
    origins = np.stack([0 * below - 20, below * shift - 30, 100 - below], axis=1)
    row = np.array([np.cos(turn), np.sin(turn), 0])
    column = np.array([-np.sin(turn), np.cos(turn), 0])
    of_source = tuple(shape[axes.index(a)] for a in range(3))
    parts = np.zeros(shape, np.int16), origins, row, column, SPACING
    bare = CTVolume(*parts, Source(folder, "dicom", of_source, axes, flipped))

    # By the definition of ImageOrientationPatient: along a row of the image, then down a column.
    transposed = axes[1] > axes[2]
    right = row * (-1 if flipped[2] else 1)
    down = column * (-1 if flipped[1] else 1)
    orientation = [*down, *right] if transposed else [*right, *down]
    spacing = SPACING[::-1] if transposed else SPACING
    y, x = (shape[1] - 1 if flipped[1] else 0), (shape[2] - 1 if flipped[2] else 0)
    positions = bare.to_world(x, y, np.arange(shape[0]))

    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    folder.mkdir(parents=True, exist_ok=True)
    if frames:
        instances = enhanced(folder, of_source, orientation, spacing, positions, change)
    else:
        instances = []
        for k, position in enumerate(positions):
            header = common_header(CTImageStorage, study, series, frame)
            header.Rows, header.Columns = of_source[1:]
            header.InstanceNumber, header.SliceThickness = k + 1, 3.0
            header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
            header.ImageOrientationPatient = [f"{v:.9f}" for v in orientation]
            header.ImagePositionPatient = [f"{v:.9f}" for v in position]
            header.PixelSpacing = [str(v) for v in spacing]
            header.PixelData = bytes(2 * header.Rows * header.Columns)
            change(header)
            header.save_as(folder / f"{k}.dcm", enforce_file_format=True)
            instances.append(Instance(folder / f"{k}.dcm", header.SOPInstanceUID))
    source = Source(
        folder, "dicom", of_source, axes, flipped, tuple(instances), slice_thickness_mm=3.0
    )
    return CTVolume(*parts, source)


def common_header(sop_class, study, series, frame):
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SOPClassUID, header.SOPInstanceUID = sop_class, generate_uid()
    header.SpecificCharacterSet = "ISO_IR 100"
    header.PatientName, header.PatientID = "Müller^Jürgen", "PAT-4711"
    header.PatientBirthDate, header.PatientSex = "19580203", "M"
    header.StudyInstanceUID, header.SeriesInstanceUID = study, series
    header.FrameOfReferenceUID, header.PositionReferenceIndicator = frame, ""
    header.StudyDate, header.StudyTime, header.StudyID = "20200102", "101112", "S1"
    header.AccessionNumber, header.ReferringPhysicianName = "ACC-99", "House^G"
    header.Modality, header.Manufacturer, header.SeriesNumber = "CT", "maker", 3
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
    header.PixelRepresentation, header.RescaleIntercept, header.RescaleSlope = 1, -1000, 1
    return header


def enhanced(folder, shape, orientation, spacing, positions, change):
    """One multi-frame file whose frames run from feet to head, with one more that is not used."""
    header = common_header(EnhancedCTImageStorage, generate_uid(), generate_uid(), generate_uid())
    header.Rows, header.Columns = shape[1:]
    header.InstanceNumber = 1
    header.NumberOfFrames = len(positions) + 1
    header.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    per_frame = []
    for k, position in enumerate([positions[-1] - (0, 0, 40), *positions[::-1]]):
        item, plane, where, content = Dataset(), Dataset(), Dataset(), Dataset()
        plane.ImageOrientationPatient = [f"{v:.9f}" for v in orientation]
        where.ImagePositionPatient = [f"{v:.9f}" for v in position]
        content.FrameAcquisitionNumber, content.StackID, content.InStackPositionNumber = 1, "1", k
        item.PlaneOrientationSequence, item.PlanePositionSequence = [plane], [where]
        item.FrameContentSequence = [content]
        per_frame.append(item)
    measures = Dataset()
    measures.PixelSpacing, measures.SliceThickness = [str(v) for v in spacing], 3.0
    header.SharedFunctionalGroupsSequence = [Dataset()]
    header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence = [measures]
    header.PerFrameFunctionalGroupsSequence = per_frame
    header.PixelData = bytes(2 * header.Rows * header.Columns * header.NumberOfFrames)
    change(header)
    path = folder / "all"
    header.save_as(path, enforce_file_format=True)
    count = len(positions)
    return [Instance(path, header.SOPInstanceUID, frame=count - k) for k in range(count)]


def ball(volume, centre, radius, first, last, score):
    """A lesion of discs, measured as linking measures them."""
    y, x = np.mgrid[: volume.hu.shape[1], : volume.hu.shape[2]]
    slices, area = [], volume.spacing_mm[0] * volume.spacing_mm[1]
    for k in range(first, last + 1):
        mask = np.hypot(x - centre[0], 1.3 * (y - centre[1])) < radius - abs(k - first - 1)
        box = np.array([*centre, *centre], float) + (-radius, -radius, radius, radius)
        slices.append(LesionSlice(k, box, score, Patch.of(mask)))
    measured = recist_from_mask(np.pad(slices[1].patch.mask, 1), 1.0)
    recist = measured.recist + (slices[1].patch.x - 1, slices[1].patch.y - 1)
    size = np.array(volume.spacing_mm[::-1])
    lengths = np.linalg.norm((recist[1::2] - recist[::2]) * size, axis=1)
    count = [s.patch.mask.sum() * volume.extent_mm[s.index] for s in slices]
    return Lesion(
        score, tuple(slices), float(area * sum(count)), np.zeros(3), recist, first + 1, lengths
    )


def lesions(volume):
    """Two that overlap on slice 3; the second is on slices that the first is not on."""
    first = ball(volume, (8.0, 9.0), 6, 1, 3, 0.9)
    second = ball(volume, (15.0, 10.0), 7, 3, 5, 0.4)
    assert ((first.labels(SHAPE) > 0) & (second.labels(SHAPE) > 0)).any()
    return [first, second]


def check(path):
    """dciodvfy finds no error."""
    run = subprocess.run([BIN / "dciodvfy", path], capture_output=True, text=True)
    errors = [line for line in (run.stdout + run.stderr).splitlines() if line.startswith("Error")]
    assert not errors and "IOD" not in "".join(errors), "\n".join(errors)
    assert (run.stdout + run.stderr).strip(), "dciodvfy said nothing, not even the IOD"


def check_together(paths):
    """dcentvfy finds no error: patient, study and frame of reference are the same."""
    run = subprocess.run([BIN / "dcentvfy", *paths], capture_output=True, text=True)
    errors = [line for line in (run.stdout + run.stderr).splitlines() if "Error" in line]
    assert not errors and run.returncode == 0, "\n".join(errors)


def seg_places(seg):
    """{number: sorted places in mm of the set voxels}, by the definition of the plane module."""
    pixels = np.atleast_3d(seg.pixel_array)
    pixels = pixels.reshape(-1, seg.Rows, seg.Columns)
    shared = seg.SharedFunctionalGroupsSequence[0]
    found = {}
    for plane, frame in zip(pixels, seg.PerFrameFunctionalGroupsSequence, strict=True):
        first = lambda name, frame=frame: (getattr(frame, name, None) or shared.get(name))[0]  # noqa: E731
        number = first("SegmentIdentificationSequence").ReferencedSegmentNumber
        measures = first("PixelMeasuresSequence")
        orientation = np.array(first("PlaneOrientationSequence").ImageOrientationPatient, float)
        origin = np.array(first("PlanePositionSequence").ImagePositionPatient, float)
        down, right = np.array(measures.PixelSpacing, float)
        row, column = np.nonzero(plane)
        assert len(row), "an empty frame"
        places = origin + column[:, None] * right * orientation[:3]
        places = places + row[:, None] * down * orientation[3:]
        found.setdefault(number, []).append(places)
    return {n: rounded(np.concatenate(places)) for n, places in found.items()}


def lesion_places(volume, lesion):
    index, y, x = np.nonzero(lesion.labels(volume.hu.shape))
    return rounded(volume.to_world(x, y, index))


def rounded(places):
    return sorted(map(tuple, np.round(places, 2) + 0.0))


CASES = {
    **{f"orientation{n}": each for n, each in enumerate(ORIENTATIONS)},
    "uneven": dict(steps=(2.5, 2.5, 6.0, 2.5, 2.5)),
    "tilted": dict(shift=0.3),
    "multi-frame": dict(frames=True),
    "multi-frame turned": dict(frames=True, axes=(0, 2, 1), flipped=(False, True, False)),
}


@pytest.fixture(scope="module", params=CASES.items(), ids=CASES)
def case(request, tmp_path_factory):
    """A volume, its lesions, and what was written of them."""
    name, options = request.param
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


@pytest.fixture
def checked(case):
    """Of the orientations two are enough for the programs that run outside."""
    if case[0] in [f"orientation{n}" for n in (1, 2, 3, 4, 6, 7)]:
        pytest.skip("another orientation")
    return case


def test_dicom_checkers_find_no_error(checked):
    name, folder, _, _ = checked
    for path in ("seg.dcm", "sr.dcm"):
        check(folder / path)
    if "multi-frame" not in name:  # dcentvfy would judge the tests' own enhanced file
        scan = sorted((folder / "scan").iterdir())
        check_together([folder / "seg.dcm", folder / "sr.dcm", *scan])


def items(dataset, name=None):
    """All content items below, with that meaning if one is named."""
    for item in dataset.get("ContentSequence", []):
        if name in (None, item.ConceptNameCodeSequence[0].CodeMeaning):
            yield item
        yield from items(item, name)


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


def test_highdicom_reads_the_same_lesions(checked):
    _, folder, _, found = checked
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


def test_both_files_name_the_algorithm_and_that_it_is_research(checked):
    _, folder, _, _ = checked
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


def test_tid1500reader_reads_the_same(checked):
    _, folder, _, found = checked
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


def tid1500(path):
    out = path.with_suffix(".json")
    command = [BIN / "tid1500reader", "--inputDICOM", path, "--outputMetadata", out]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads(out.read_text())


def test_segimage2itkimage_reads_the_same_voxels(checked, tmp_path):
    """Where an ITK image can hold them at all: evenly spaced slices at right angles."""
    nibabel = pytest.importorskip("nibabel")
    name, folder, volume, found = checked
    if name in ("uneven", "tilted"):
        pytest.skip("an ITK image has one interval and right angles")
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


def blank(names):
    def change(header):
        for name in names:
            header.__setattr__(name, None if name == "SliceThickness" else "")

    return change


def without(names):
    def change(header):
        for name in names:
            header.__delattr__(name)

    return change


@pytest.mark.parametrize("change", [blank(EMPTY), without(EMPTY)], ids=["empty", "missing"])
def test_tags_that_are_empty_or_missing(tmp_path, change):
    """All at once; the files are valid even though the source is not."""
    volume = source_volume(tmp_path / "scan", change=change)
    found = lesions(volume)
    write_seg(tmp_path / "seg.dcm", found, volume, ALGORITHM)
    write_sr(tmp_path / "sr.dcm", found, volume, ALGORITHM, seg=tmp_path / "seg.dcm")
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    for number, lesion in enumerate(found, 1):
        assert seg_places(seg)[number] == lesion_places(volume, lesion)
    assert seg.PatientID == "" and seg.FrameOfReferenceUID
    for path in ("seg.dcm", "sr.dcm"):
        check(tmp_path / path)


@pytest.mark.parametrize(
    "character_set, written, name",
    [
        (["", "ISO 2022 IR 87"], ["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"),
        (["ISO 2022 IR 6", "ISO 2022 IR 149"],) * 2 + ("Hong^Gildong=洪^吉洞",),
        ("GB18030", "GB18030", "Wang^XiaoDong=王^小东"),
        ("ISO IR 100", "ISO_IR 192", "Doe^Jane"),  # misspelt
    ],
    ids=["Japanese", "Korean", "Chinese", "misspelt"],
)
@pytest.mark.filterwarnings("ignore:Incorrect value for Specific Character Set")
def test_names_in_any_character_set(tmp_path, character_set, written, name):
    def change(header):
        header.SpecificCharacterSet, header.PatientName = character_set, name

    volume = source_volume(tmp_path / "scan", change=change)
    found = lesions(volume)
    write_seg(tmp_path / "seg.dcm", found, volume, ALGORITHM)
    write_sr(tmp_path / "sr.dcm", found, volume, ALGORITHM)
    source = pydicom.dcmread(tmp_path / "scan" / "1.dcm")
    for path in ("seg.dcm", "sr.dcm"):
        dataset = pydicom.dcmread(tmp_path / path)
        assert dataset.SpecificCharacterSet == written and dataset.PatientName == name
        assert dataset.PatientName.original_string == source.PatientName.original_string
        check(tmp_path / path)


WRONG = {
    "PatientSex": ["male"],
    "StudyDate": ["2020-01-32", "20200102\\20200103"],
    "StudyTime": ["noon"],
    "PatientBirthDate": ["19580203-1960"],
    "PatientID": ["a\\b", "\0"],
    "PatientName": ["a\\b", "\x1b$B"],
    "AccessionNumber": ["x" * 100],
    "PatientWeight": ["heavy"],
    "LossyImageCompressionRatio": ["many"],
    "StudyInstanceUID": ["x"],
    "SOPClassUID": ["x"],
    "FrameOfReferenceUID": ["1.2\\1.3"],
    "Rows": [None],
    "PixelSpacing": ["x"],
    "SliceThickness": ["x", "1e400"],
    "ImageOrientationPatient": ["1\\0\\0"],
    "ImagePositionPatient": [""],
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return source_volume(tmp_path_factory.mktemp("plain") / "scan")


@pytest.mark.parametrize("name, wrong", [(n, w) for n, values in WRONG.items() for w in values])
@pytest.mark.filterwarnings("ignore")
def test_wrong_values_are_mended_passed_on_or_refused(tmp_path, monkeypatch, plain, name, wrong):
    """Whatever the header holds: files that read back, or a DataError that names the scan."""
    volume, found = plain, lesions(plain)[:1]
    vr = pydicom.datadict.dictionary_VR(name)

    def header(instance):
        found = pydicom.dcmread(instance.path, stop_before_pixels=True)
        text = b"" if wrong is None else wrong.encode()
        tag = pydicom.tag.Tag(name)
        found[tag] = pydicom.dataelem.RawDataElement(
            tag, vr, len(text), text, 0, False, True
        )  # fmt: skip
        return found

    monkeypatch.setattr("ct_volumes.dicom_out.read_header", header)
    try:
        write_seg(tmp_path / "seg.dcm", found, volume, ALGORITHM)
        write_sr(tmp_path / "sr.dcm", found, volume, ALGORITHM, seg=tmp_path / "seg.dcm")
    except DataError as error:
        assert str(volume.source.path) in str(error)
        assert not (tmp_path / "sr.dcm").exists()
    else:
        seg = pydicom.dcmread(tmp_path / "seg.dcm")
        assert seg_places(seg)[1] == lesion_places(volume, found[0])
        assert len(list(items(pydicom.dcmread(tmp_path / "sr.dcm"), "Measurement Group"))) == 2


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


def test_what_cannot_be_referred_to_is_refused(tmp_path):
    volume = source_volume(tmp_path / "scan", change=without(["StudyInstanceUID"]))
    for write in (write_seg, write_sr):
        with pytest.raises(DataError, match="StudyInstanceUID"):
            write(tmp_path / "a.dcm", lesions(volume), volume, ALGORITHM)
    source = Source(tmp_path / "a.nii", "nifti", SHAPE, affine=np.eye(4))
    parts = [getattr(volume, name) for name in ("hu", "origins_mm", "row_direction")]
    nifti = CTVolume(*parts, volume.column_direction, SPACING, source)
    for write in (write_seg, write_sr):
        with pytest.raises(DataError, match="not DICOM"):
            write(tmp_path / "a.dcm", lesions(volume), nifti, ALGORITHM)
    two = [source_volume(tmp_path / f"frames{n}", frames=True) for n in range(2)]
    mixed = (*two[0].source.instances[:3], *two[1].source.instances[3:])
    object.__setattr__(two[0].source, "instances", mixed)
    with pytest.raises(DataError, match="several multi-frame"):
        write_seg(tmp_path / "a.dcm", lesions(two[0]), two[0], ALGORITHM)
    assert not (tmp_path / "a.dcm").exists()


def test_a_seg_of_other_lesions_is_refused(tmp_path):
    volume = source_volume(tmp_path / "scan")
    found = lesions(volume)
    write_seg(tmp_path / "seg.dcm", found[:1], volume, ALGORITHM)
    for path, message in (("seg.dcm", "1 segments"), ("scan/0.dcm", "SEG"), ("no.dcm", "SEG")):
        with pytest.raises(DataError, match=message):
            write_sr(tmp_path / "sr.dcm", found, volume, ALGORITHM, seg=tmp_path / path)


@pytest.mark.parametrize("write", [write_seg, write_sr])
def test_a_failing_write_leaves_what_was_there(tmp_path, monkeypatch, write):
    volume = source_volume(tmp_path / "scan")
    path = tmp_path / "out" / "a.dcm"
    path.parent.mkdir()
    path.write_bytes(b"before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(WriteError, match="full"):
        write(path, lesions(volume), volume, ALGORITHM)
    assert path.read_bytes() == b"before" and len(list(path.parent.iterdir())) == 1


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
