"""DICOM series that the tests of SEG and SR write, lesions in them, and how what is written of them
is read back."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

from ct_volumes.lesions import Algorithm, Lesion, LesionSlice, Patch
from ct_volumes.volume import CTVolume, Instance, Source
from deeplesion.data.recist import recist_from_mask

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
    assert not errors, "\n".join(errors)
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


def items(dataset, name=None):
    """All content items below, with that meaning if one is named."""
    for item in dataset.get("ContentSequence", []):
        if name in (None, item.ConceptNameCodeSequence[0].CodeMeaning):
            yield item
        yield from items(item, name)


def tid1500(path):
    out = path.with_suffix(".json")
    command = [BIN / "tid1500reader", "--inputDICOM", path, "--outputMetadata", out]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads(out.read_text())
