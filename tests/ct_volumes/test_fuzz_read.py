"""The readers on damaged files: a valid volume or an error that the user can mend, nothing else,
and no memory on a damaged header's word."""

import gzip
import io
import struct
import tracemalloc
import zipfile

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydicom.uid import RLELossless

from ct_volumes.read import find_scans, list_series, read_volume
from ct_volumes.volume import CTVolume
from deeplesion.errors import UserError

from .scan_files import anatomy, assert_same, change, dicomdir, enhanced, nifti, origins, series

HU = anatomy(3, 8, 7)
SEEDED = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
DAMAGE = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),  # where
        st.sampled_from(["set", "cut out", "insert", "end"]),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def damaged(data, damage):
    data = bytearray(data)
    for where, kind, content in damage:
        at = int(where * len(data))
        if kind == "set":
            data[at : at + len(content)] = content[: len(data) - at]
        elif kind == "cut out":
            del data[at : at + len(content)]
        elif kind == "insert":
            data[at:at] = content
        elif at > 10:
            del data[at:]
    return bytes(data)


def try_to_read(path, whole=False):
    """A volume, or None where the files are refused; `whole` ones must be read as what they are."""
    try:
        list_series(path)
        find_scans(path)
        volume = read_volume(path)
    except UserError as error:
        assert str(error) and not whole, error
        return None
    assert isinstance(volume, CTVolume) and volume.hu.dtype == np.int16
    if whole:
        assert_same(volume, HU)
    return volume


def as_bytes(ds, **options):
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, **options)
    return buffer.getvalue()


def scan(images, folder):
    folder.mkdir(exist_ok=True)
    for i, data in enumerate(images):
        (folder / str(i)).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def files():
    """Files of one slice each: plain, in implicit VR, deflated, of RLE; and an enhanced one."""
    plain = [as_bytes(ds, enforce_file_format=True) for ds in series(HU, origins(3))]
    implicit = series(HU, origins(3))[1]
    implicit.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    deflated = series(HU, origins(3))[1]
    deflated.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    rle = series(HU, origins(3))[1]
    rle.compress(RLELossless, generate_instance_uid=False)
    return plain, dict(
        plain=plain[1],
        implicit=as_bytes(implicit, enforce_file_format=True),
        deflated=as_bytes(deflated, enforce_file_format=True),
        rle=as_bytes(rle, enforce_file_format=True),
        enhanced=as_bytes(enhanced(HU, origins(3)), enforce_file_format=True),
    )


@pytest.mark.parametrize("kind", ["plain", "implicit", "deflated", "rle", "enhanced"])
def test_damaged_bytes_of_dicom(tmp_path, files, kind):
    plain, kinds = files

    @settings(SEEDED, max_examples=20)
    @given(DAMAGE)
    @example([])
    def attempt(damage):
        broken = damaged(kinds[kind], damage)
        images = [broken] if kind == "enhanced" else [plain[0], broken, plain[2]]
        try_to_read(scan(images, tmp_path / "scan"), whole=not damage)

    attempt()


def test_damaged_bytes_of_a_dicomdir(tmp_path, files):
    scan(files[0], tmp_path)
    whole = dicomdir(tmp_path, ["0", "1", "2"]).read_bytes()

    @settings(SEEDED, max_examples=40)
    @given(DAMAGE)
    @example([])
    def attempt(damage):
        (tmp_path / "DICOMDIR").write_bytes(damaged(whole, damage))
        try_to_read(tmp_path / "DICOMDIR", whole=not damage)

    attempt()


KEYWORDS = (
    "Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", "SamplesPerPixel",
    "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope",
    "RescaleIntercept", "SeriesNumber", "InstanceNumber", "NumberOfFrames", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "SliceThickness", "ImageType", "SpecificCharacterSet", "Modality",
    "SOPClassUID", "SeriesInstanceUID", "PatientName", "PhotometricInterpretation", "PixelData",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "RescaleType",
)  # fmt: skip
TEXTS = ["", "nan", "inf", "-1", "0", "1e308", "1e-308", "99999999999", "a\\b", "1\\2\\3", "\xff"]
NUMBERS = [0, 1, 7, 8, 12, 32, 64, 255, 8192, 65535]


@settings(SEEDED, max_examples=80)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(KEYWORDS),
            st.one_of(st.sampled_from(TEXTS), st.sampled_from(NUMBERS), st.text(max_size=6)),
        ),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
@example([], True)
def test_headers_of_dicom_that_say_anything(tmp_path, changes, all_slices):
    """Values that their tag cannot have, also with another type than the tag's."""
    images = []
    for i, ds in enumerate(series(HU, origins(3))):
        if all_slices or i == 1:
            for keyword, value in changes:
                tag = pydicom.tag.Tag(keyword)
                raw = struct.pack("<H", value) if isinstance(value, int) else value.encode()
                raw += b" " * (len(raw) % 2)
                vr = "US" if isinstance(value, int) else "LO" if tag.group != 0x7FE0 else "OW"
                ds[tag] = pydicom.dataelem.RawDataElement(tag, vr, len(raw), raw, 0, False, True)
        try:
            images.append(as_bytes(ds, enforce_file_format=False))
        except Exception:  # pydicom cannot write it
            return
    try_to_read(scan(images, tmp_path / "scan"), whole=not changes)


@pytest.mark.parametrize(
    "tags",
    [
        dict(Rows=8192, Columns=8192),
        dict(Rows=65535, Columns=65535),
        dict(BitsAllocated=32, Rows=8000, Columns=8000),
        dict(NumberOfFrames=2**31 - 1),
    ],
)
@pytest.mark.parametrize("make", [lambda: series(HU, origins(3)), lambda: [enhanced()]])
def test_no_memory_on_a_damaged_headers_word(tmp_path, tags, make):
    images = make()
    for ds in images:
        change(ds, tags)
    folder = scan([as_bytes(ds, enforce_file_format=True) for ds in images], tmp_path / "scan")
    tracemalloc.start()
    assert try_to_read(folder) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6


@pytest.mark.parametrize("packed", [False, True])
def test_damaged_bytes_of_a_zip_and_of_nifti(tmp_path, files, packed):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if packed else 0) as archive:
        for i, data in enumerate(files[0]):
            archive.writestr(f"CT/{i}", data)
    volume = nifti(tmp_path / "whole.nii", HU, origins(3)).read_bytes()
    (tmp_path / "whole.nii").unlink()

    @settings(SEEDED, max_examples=40)
    @given(DAMAGE)
    @example([])
    def attempt(damage):
        (tmp_path / "a.zip").write_bytes(damaged(buffer.getvalue(), damage))
        try_to_read(tmp_path / "a.zip", whole=not damage)
        (tmp_path / "a.nii").write_bytes(
            damaged(gzip.compress(volume) if packed else volume, damage)
        )
        try_to_read(tmp_path / "a.nii", whole=not damage)

    attempt()


FIELDS = (
    "dim", "datatype", "bitpix", "pixdim", "vox_offset", "scl_slope", "scl_inter", "qform_code",
    "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "srow_x", "srow_y", "srow_z",
    "magic", "sizeof_hdr", "intent_code", "xyzt_units",
)  # fmt: skip


@settings(SEEDED, max_examples=120)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(FIELDS),
            st.sampled_from(
                [0, 1, -1, 2, 3, 4, 16, 127, 512, 32767, -32768, np.nan, np.inf, 1e38, 1e-38]
            ),
            st.integers(0, 7),
        ),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
@example([], False)
@example([], True)
def test_headers_of_nifti_that_say_anything(tmp_path, changes, packed):
    data = nifti(tmp_path / "scan.nii", HU, origins(3)).read_bytes()
    fields = np.frombuffer(data[:348], nib.nifti1.header_dtype).copy()
    for field, value, index in changes:
        part = fields[field].reshape(-1)
        with np.errstate(all="ignore"):
            if part.dtype.kind == "S":
                part[0] = str(value).encode()
            else:
                whole = part.dtype.kind in "iu"
                value = int(np.nan_to_num(value).clip(-32768, 32767)) if whole else value
                part[index % part.size] = np.asarray(value).astype(part.dtype)
    data = fields.tobytes() + data[348:]
    path = tmp_path / "scan.nii"
    path.write_bytes(gzip.compress(data) if packed else data)
    tracemalloc.start()
    try_to_read(path, whole=not changes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6
