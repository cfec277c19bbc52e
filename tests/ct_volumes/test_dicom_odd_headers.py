"""SEG and SR of sources whose headers are empty, wrong or foreign; what is refused."""

import numpy as np
import pydicom
import pytest

from ct_volumes.seg_out import write_seg
from ct_volumes.sr_out import write_sr
from ct_volumes.volume import CTVolume, Source
from deeplesion.errors import DataError, WriteError

from .dicom_sources import (
    ALGORITHM,
    SHAPE,
    SPACING,
    check,
    items,
    lesion_places,
    lesions,
    seg_places,
    source_volume,
)

EMPTY = (
    "PatientID", "PatientBirthDate", "StudyID", "AccessionNumber", "PatientSex", "StudyDate",
    "SliceThickness", "SpecificCharacterSet", "ReferringPhysicianName", "FrameOfReferenceUID",
)  # fmt: skip


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
