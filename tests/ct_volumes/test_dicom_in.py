"""DICOM -> CTVolume: geometry, pixel values and every trap, each with a file that has it."""

import itertools
import subprocess
import zipfile

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from ct_volumes.dicom_decode import Decoder, DecodingError
from ct_volumes.dicom_in import read_header
from ct_volumes.read import list_series, read_volume
from deeplesion.errors import DataError

from .scan_files import (
    NAME,
    PATIENT,
    anatomy,
    assert_same,
    enhanced,
    image,
    notes,
    origins,
    series,
    turned,
    write,
    write_bare,
)

HU = anatomy()


def read(tmp_path, images, **options):
    return read_volume(write(tmp_path / "scan", images), **options)


@pytest.mark.parametrize(
    "transposed, rows, columns", list(itertools.product((False, True), repeat=3))
)
@pytest.mark.parametrize("order", ["head first", "feet first", "shuffled"])
def test_the_same_anatomy_comes_out_of_every_orientation_and_order(
    tmp_path, transposed, rows, columns, order
):
    images = series(**turned(HU, origins(), transposed, rows, columns))
    if order == "feet first":
        images = images[::-1]
    elif order == "shuffled":
        images = [images[i] for i in np.random.default_rng(1).permutation(len(images))]
        for ds in images:
            ds.InstanceNumber = ""
    volume = read(tmp_path, images)
    assert_same(volume)
    assert volume.source.notes == ()
    # Back in the source: each pixel of each file, placed by the standard's own equation.
    stored = volume.in_source(volume.hu)
    for i, instance in enumerate(volume.source.instances):
        ds = pydicom.dcmread(instance.path)
        assert instance.uid == ds.SOPInstanceUID
        np.testing.assert_array_equal(stored[i], ds.pixel_array.astype(int) - 1024)
        r, c = 3, 7 if not transposed else 2
        orientation = np.array(ds.ImageOrientationPatient)
        place = np.array(ds.ImagePositionPatient) + c * ds.PixelSpacing[1] * orientation[:3]
        place = place + r * ds.PixelSpacing[0] * orientation[3:]
        candidates = np.argwhere(volume.hu[i] == int(ds.pixel_array[r, c]) - 1024)
        worlds = [volume.to_world(x, y, i) for y, x in candidates]
        assert np.abs(np.array(worlds) - place).max(axis=1).min() < 1e-6


def test_a_tilted_gantry_keeps_its_slices(tmp_path):
    volume = read(tmp_path, series(where=origins(tilt=0.5)))
    assert_same(volume, where=origins(tilt=0.5))
    assert "tilted by 14.0 degrees" in notes(volume)


def test_oblique_slices_up_to_a_tilt_are_axial(tmp_path):
    angle = np.radians(25)
    column = np.array([0, np.cos(angle), np.sin(angle)])
    normal = np.cross((1, 0, 0), column)
    where = np.array([0, 0, 50]) - np.arange(6)[:, None] * 2.0 * normal
    volume = read(tmp_path, series(where=where, column=column))
    np.testing.assert_array_equal(volume.hu, HU)
    np.testing.assert_allclose(volume.interval_mm, 2)
    np.testing.assert_allclose(volume.to_world(0, 4, 1), where[1] + 3 * column, atol=1e-5)


@pytest.mark.parametrize(
    "column, row, reason",
    [
        ((0, 0, -1), (1, 0, 0), "coronal"),
        ((0, 0, -1), (0, 1, 0), "sagittal"),
        ((0, 0.7071, -0.7071), (1, 0, 0), "oblique by 45 degrees"),
    ],
)
def test_what_is_not_axial_is_refused_with_the_reason(tmp_path, column, row, reason):
    images = series(row=row, column=column)
    with pytest.raises(DataError, match=reason):
        read(tmp_path, images)
    assert reason in list_series(tmp_path / "scan")[0].skipped


def test_a_gap_stays_and_is_reported(tmp_path):
    where = origins()
    where[4:, 2] -= 6
    volume = read(tmp_path, series(where=where))
    assert_same(volume, where=where)
    assert "1 gap between slices 2 mm apart: 8 mm after slice 3" in notes(volume)


def test_uneven_spacing_stays_and_is_reported(tmp_path):
    where = origins()
    where[:, 2] -= [0, 0.3, 0, 0.2, 0.5, 0]
    volume = read(tmp_path, series(where=where))
    assert_same(volume, where=where)
    assert "unevenly spaced, from 1.5 to 2.3 mm" in notes(volume)


def test_the_interval_is_that_of_the_positions_not_the_thickness(tmp_path):
    volume = read(tmp_path, series(SliceThickness=3.0))
    np.testing.assert_allclose(volume.interval_mm, 2)
    assert volume.source.slice_thickness_mm == 3
    assert "3 mm thick and 2 mm apart" in notes(volume)


def test_slope_and_intercept_are_those_of_each_slice(tmp_path):
    images, expected = series(), []
    for i, ds in enumerate(images):
        slope, intercept = 0.5 + i, -1000 - i
        ds.PixelRepresentation, ds.RescaleSlope, ds.RescaleIntercept = 1, slope, intercept
        stored = np.rint((HU[i] - intercept) / slope).astype(np.int16)
        ds.PixelData = stored.tobytes()
        expected.append(np.rint(stored.astype(float) * slope + intercept))
        assert np.abs(expected[i] - HU[i]).max() <= slope / 2 + 0.5
    assert_same(read(tmp_path, images), np.array(expected))


def padded(value, signed, limit=None, vr=None, intercept=-1024):
    """A series whose first row is stored as -2000."""
    images = series()
    for ds, hu in zip(images, HU):
        stored = hu.astype(np.int32) - intercept
        stored[0] = -2000
        ds.PixelRepresentation, ds.RescaleIntercept = int(signed), intercept
        ds.PixelData = stored.astype(np.uint16).tobytes()
        if value is not None:
            ds.add_new("PixelPaddingValue", vr or ("SS" if signed else "US"), value)
        if limit is not None:
            ds.add_new("PixelPaddingRangeLimit", vr or ("SS" if signed else "US"), limit)
    return images


@pytest.mark.parametrize(
    "value, signed, limit, vr",
    [
        (-2000, True, None, None),
        (63536, True, None, "US"),  # with a sign, written as without
        (63536, False, None, None),
        (-2000, False, None, "SS"),
        (-2000, True, -1990, None),
        (-1990, True, -2100, None),  # in the other order
        (63546, True, 63436, "US"),
    ],
)
def test_padding_is_a_stored_value_and_becomes_air(tmp_path, value, signed, limit, vr):
    expected = HU.copy()
    expected[:, 0] = -1024
    assert_same(read(tmp_path, padded(value, signed, limit, vr)), expected)


def test_padding_that_looks_like_tissue_is_told(tmp_path):
    images = series()
    for ds in images:
        ds.PixelRepresentation = 0
        ds.PixelPaddingValue = 1024  # 0 HU
    volume = read(tmp_path, images)
    np.testing.assert_array_equal(volume.hu, np.where(HU == 0, -1024, HU))
    assert "PixelPaddingValue" in notes(volume)


def test_values_are_clipped_into_int16(tmp_path):
    images = series(RescaleIntercept=-1024)
    stored = HU[0].astype(np.int32) + 1024
    stored[0, 0] = 65535
    images[0].PixelData = stored.astype(np.uint16).tobytes()
    volume = read(tmp_path, images)
    assert volume.hu[0, 0, 0] == 32767
    assert "clipped" in notes(volume)


def read_stored(tmp_path, images, stored, order):
    """Reads images that hold the (S, H, W) values `stored` in a byte order."""
    folder = tmp_path / "scan"
    folder.mkdir()
    for i, (ds, values) in enumerate(zip(images, stored)):
        ds.PixelData = values.astype(f"{order}u2").tobytes()
        little = order == "<"
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        pydicom.dcmwrite(folder / f"{i}.dcm", ds, implicit_vr=False, little_endian=little)
    return read_volume(folder)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("signed", [False, True])
def test_bits_above_those_stored_are_an_overlay_or_the_sign(tmp_path, signed, order):
    images = series(BitsStored=12, HighBit=11)
    expected = np.clip(HU, -1024, 1000)
    stored = (expected.astype(np.int32) + (0 if signed else 1024)) & 0xFFF
    stored[:, ::2] |= 0x1000  # an overlay in bit 12
    for ds in images:
        ds.PixelRepresentation, ds.RescaleIntercept = int(signed), 0 if signed else -1024
        ds.add_new(0x60000102, "US", 12)
    assert_same(read_stored(tmp_path, images, stored, order), expected)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("extended", [False, True])
def test_values_with_a_sign_of_fewer_bits(tmp_path, extended, order):
    images = series(BitsStored=12, HighBit=11, PixelRepresentation=1, RescaleIntercept=0)
    stored = HU.astype(np.int32) & (0xFFFF if extended else 0xFFF)
    volume = read_stored(tmp_path, images, stored, order)
    assert_same(volume)
    assert volume.source.notes == ()


@pytest.mark.parametrize("order", "<>")
def test_values_without_a_sign_of_fewer_bits(tmp_path, order):
    volume = read_stored(
        tmp_path, series(BitsStored=12, HighBit=11), HU.astype(np.int32) + 1024, order
    )
    assert_same(volume)
    assert volume.source.notes == ()


def test_more_bits_than_stated_stay_and_are_told(tmp_path):
    images = series(BitsStored=10, HighBit=9)
    volume = read(tmp_path, images)
    assert_same(volume)
    assert "more bits" in notes(volume)


def test_monochrome1_turns_the_display_not_the_values(tmp_path):
    volume = read(tmp_path, series(PhotometricInterpretation="MONOCHROME1"))
    assert_same(volume)
    assert "MONOCHROME1" in notes(volume)


def compressed(ds, syntax):
    if syntax in (RLELossless, JPEGLSLossless):
        ds.compress(syntax, generate_instance_uid=False)
        return ds
    gdcm = pytest.importorskip("gdcm")
    folder = ds.folder
    ds.save_as(folder / "plain", enforce_file_format=True)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(folder / "plain"))
    assert reader.Read()
    turn = gdcm.ImageChangeTransferSyntax()
    kind = {
        "JPEG lossless": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
        "JPEG 2000": gdcm.TransferSyntax.JPEG2000Lossless,
    }[syntax]
    turn.SetTransferSyntax(gdcm.TransferSyntax(kind))
    turn.SetInput(reader.GetImage())
    assert turn.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetFileName(str(folder / "packed"))
    writer.SetImage(turn.GetOutput())
    assert writer.Write()
    return pydicom.dcmread(folder / "packed")


@pytest.mark.parametrize(
    "syntax", [RLELossless, JPEGLSLossless, "JPEG lossless", "JPEG 2000"], ids=str
)
def test_compressed_images(tmp_path, syntax):
    images = []
    hu = anatomy(rows=32, columns=24)
    for ds in series(hu):
        ds.folder = tmp_path
        images.append(compressed(ds, syntax))
    volume = read(tmp_path, images)
    assert_same(volume, hu)
    assert volume.source.notes == ()


def test_a_decoder_that_is_ended_is_an_error_and_the_next_one_works(tmp_path):
    """As on files on which the libraries end their process."""
    images = series(anatomy(rows=32, columns=24))
    for ds in images:
        ds.compress(JPEGLSLossless, generate_instance_uid=False)
    files = sorted(write(tmp_path / "scan", images).iterdir())
    with Decoder() as decoder:
        (image,) = decoder.images(files[0].read_bytes(), [0])
        decoder._process.kill()
        decoder._process.wait()
        with pytest.raises(DecodingError, match="broke off"):
            list(decoder.images(files[0].read_bytes(), [0]))
        (again,) = decoder.images(files[0], [0])
        np.testing.assert_array_equal(image, again)
        with pytest.raises(DecodingError):
            list(decoder.images(files[0].read_bytes()[:-300], [0]))
        process = decoder._process or subprocess.Popen(["true"])
    assert process.wait(5) is not None


def test_compressed_pixels_that_are_damaged_are_refused(tmp_path):
    images = series(anatomy(rows=32, columns=24))
    for ds in images:
        ds.compress(JPEGLSLossless, generate_instance_uid=False)
    images[2].PixelData = pydicom.encaps.encapsulate([b"no image at all "])
    with pytest.raises(DataError, match="cannot be decoded"):
        read(tmp_path, images)


@pytest.mark.parametrize("packed", [False, True])
def test_a_compressed_enhanced_file(tmp_path, packed):
    ds = enhanced(order=[5, 3, 1, 0, 2, 4])
    ds.compress(JPEGLSLossless, generate_instance_uid=False)
    path = write(tmp_path / "scan", [ds]) / "IM0000"
    if packed:
        with zipfile.ZipFile(tmp_path / "scan.zip", "w") as archive:
            archive.write(path)
        path = tmp_path / "scan.zip"
    assert_same(read_volume(path))


def test_deflated_and_big_endian_files(tmp_path):
    images = series()
    for ds in images[::2]:
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    folder = write(tmp_path / "scan", images[::2])
    for i, (ds, hu) in enumerate(zip(images[1::2], HU[1::2])):
        ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        ds.PixelData = (hu.astype(np.int32) + 1024).astype(">u2").tobytes()
        pydicom.dcmwrite(folder / f"big{i}", ds, implicit_vr=False, little_endian=False)
    assert_same(read_volume(folder))


def test_a_lossy_compression_is_told(tmp_path):
    assert "with loss" in notes(read(tmp_path, series(LossyImageCompression="01")))


@pytest.mark.parametrize("order", [None, [3, 0, 5, 1, 4, 2]])
def test_an_enhanced_file(tmp_path, order):
    write(tmp_path / "scan", [enhanced(order=order)])
    (file,) = (tmp_path / "scan").iterdir()
    volume = read_volume(file)
    assert_same(volume)
    assert [i.frame for i in volume.source.instances] == [
        (order or list(range(6))).index(i) for i in range(6)
    ]
    assert volume.source.slice_thickness_mm == 2


def test_a_multi_frame_file_is_parsed_once_for_its_pixels(tmp_path, monkeypatch):
    write(tmp_path / "scan", [enhanced()])
    from ct_volumes import dicom_decode

    calls = []
    once = dicom_decode.iter_pixels
    monkeypatch.setattr(
        dicom_decode, "iter_pixels", lambda *a, **k: calls.append(1) or once(*a, **k)
    )
    assert_same(read_volume(tmp_path / "scan"))
    assert len(calls) == 1


def test_an_enhanced_file_that_describes_fewer_frames_than_it_has_is_refused(tmp_path):
    with pytest.raises(DataError, match="7 frames and describes 6"):
        read(tmp_path, [enhanced(NumberOfFrames=7)])


def test_files_without_preamble(tmp_path):
    for i, ds in enumerate(series()):
        write_bare(tmp_path / f"scan/{i}", ds)
    assert_same(read_volume(tmp_path / "scan"))


@pytest.mark.parametrize(
    "tags",
    [
        dict(SeriesInstanceUID="", StudyInstanceUID="", FrameOfReferenceUID=""),
        dict(SliceThickness="", ConvolutionKernel="", SeriesDescription="", SeriesNumber=None),
        dict(PatientName="", PatientID="", InstanceNumber=""),
        dict(ImageType=None, RescaleSlope=""),
        dict(SOPInstanceUID=""),
        dict(Modality="", BitsStored=None),
    ],
    ids=lambda tags: "-".join(tags),
)
def test_empty_and_missing_tags(tmp_path, tags):
    images = series()
    for ds in images:
        for keyword, value in tags.items():
            if value is None:
                del ds[keyword]
            else:
                ds[keyword] = pydicom.DataElement(keyword, ds[keyword].VR, value or None)
        if "SOPInstanceUID" in tags:
            ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
        ds.preamble = ds.preamble
    folder = tmp_path / "scan"
    folder.mkdir()
    for i, ds in enumerate(images):
        ds.save_as(folder / str(i), enforce_file_format=False)
    assert_same(read_volume(folder))


def repeated(change_second=None, **tags):
    """Every position twice."""
    first, second = series(**tags), series(**tags)
    for i, ds in enumerate(second):
        ds.InstanceNumber = 100 + i
        if change_second:
            change_second(ds)
    return first + second


def brighter(ds):
    stored = np.frombuffer(ds.PixelData, np.uint16) + np.uint16(10)
    ds.PixelData = stored.tobytes()


@pytest.mark.parametrize("same_uid", [False, True])
def test_an_image_that_is_there_twice_is_taken_once(tmp_path, same_uid):
    images = series()
    copies = series()
    for ds, copy in zip(images, copies):
        if same_uid:
            copy.SOPInstanceUID = ds.SOPInstanceUID
    volume = read(tmp_path, images + copies[:4])
    assert_same(volume)
    assert "4 images that the scan holds twice left out" in notes(volume)


def test_different_images_at_one_place_are_refused(tmp_path):
    with pytest.raises(DataError, match="up to 2 different images at one place"):
        read(tmp_path, repeated(brighter))


@pytest.mark.parametrize(
    "keyword, values",
    [
        ("AcquisitionNumber", (1, 2)),
        ("TemporalPositionIdentifier", (1, 2)),
        ("ContentTime", ("100000", "100010.5")),
    ],
)
def test_phases_are_told_apart(tmp_path, keyword, values):
    def second(ds):
        brighter(ds)
        setattr(ds, keyword, values[1])

    images = repeated(second, **{keyword: values[0]})
    volume = read(tmp_path, images)
    assert_same(volume)
    assert f"told apart by {keyword}; this one is number 1" in notes(volume)
    entries = list_series(tmp_path / "scan")
    assert [e.id for e in entries] == ["2a", "2b"]
    assert_same(read_volume(tmp_path / "scan", "2b"), HU + 10)
    with pytest.raises(DataError, match="several series '2'"):
        read_volume(tmp_path / "scan", "2")


def test_an_acquisition_number_of_every_slice_splits_nothing(tmp_path):
    images = series()
    for i, ds in enumerate(images):
        ds.AcquisitionNumber = i
    assert_same(read(tmp_path, images))


def test_mixed_sizes_orientations_and_spacing_are_volumes_of_their_own(tmp_path):
    other = series(anatomy(7, 12, 11), origins(7, 3.0))
    turned_ones = series(**turned(anatomy(8), origins(8), flip_rows=True))
    finer = series(anatomy(9), origins(9), spacing=(0.4, 0.4))
    volume = read(tmp_path, series() + other + turned_ones + finer, series="2b")
    entries = {e.id: e.size for e in list_series(tmp_path / "scan")}
    assert sorted(entries.values()) == [(6, 10, 9), (7, 12, 11), (8, 10, 9), (9, 10, 9)]
    assert volume.hu.shape == entries["2b"]


def test_images_without_position_are_left_out_and_told(tmp_path):
    images = series()
    lost = image(HU[0], (0, 0, 0), ImagePositionPatient=None)
    volume = read(tmp_path, [*images, lost])
    assert_same(volume)
    assert "1 image of the series without ImagePositionPatient" in notes(volume)
    with pytest.raises(DataError, match="no ImagePositionPatient"):
        read_volume(write(tmp_path / "lost", [lost]))


@pytest.mark.parametrize(
    "tags, reason",
    [
        (dict(SOPClassUID="1.2.840.10008.5.1.4.1.1.7"), "secondary capture"),
        (dict(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.67"), "a report"),
        (dict(SOPClassUID="1.2.840.10008.5.1.4.1.1.4", Modality="MR"), "no CT image"),
        (dict(Modality="PT"), "no CT image"),
        (dict(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localiser"),
        (dict(ImageType=["DERIVED", "PRIMARY", "PERFUSION", "RCBF"]), "computed from"),
        (dict(SamplesPerPixel=3), "colour"),
        (dict(RescaleType="MGML"), "MGML"),
        (dict(PixelData=None), "without pixels"),
        (dict(PixelSpacing=None), "PixelSpacing"),
        (dict(PixelSpacing=[0, 0.5]), "PixelSpacing"),
        (dict(ImageOrientationPatient=[0] * 6), "ImageOrientationPatient"),
        (dict(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "ImageOrientationPatient"),
        (dict(NumberOfFrames=2), "several frames"),
        (dict(Rows=0), "0 x 9 pixels"),
        (dict(Rows=60000, Columns=60000), "60000 x 60000"),
        (dict(ModalityLUTSequence=[Dataset()]), "look-up table"),
    ],
)
def test_what_is_no_slice_of_a_ct_is_listed_with_the_reason(tmp_path, tags, reason):
    odd = [image(HU[0], (0, 0, 0), SeriesInstanceUID="1.2.3", SeriesNumber=9, **tags)]
    volume = read(tmp_path, series() + odd)
    assert_same(volume)
    assert volume.source.notes == ()
    good, bad = list_series(tmp_path / "scan")
    assert good.skipped is None and reason in bad.skipped
    with pytest.raises(DataError, match="cannot be read"):
        read_volume(tmp_path / "scan", "9")
    with pytest.raises(DataError, match="no axial CT"):
        read_volume(write(tmp_path / "odd", odd))


def test_truncated_pixels_are_refused(tmp_path):
    folder = write(tmp_path / "scan", series())
    file = folder / "IM0003"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"IM0003 cannot be decoded"):
        read_volume(folder)


def test_a_file_that_begins_as_dicom_and_is_none_is_told(tmp_path):
    folder = write(tmp_path / "scan", series())
    (folder / "IM0003").write_bytes((folder / "IM0003").read_bytes()[:150])
    volume = read_volume(folder)
    assert "1 file that looked like DICOM" in notes(volume) and "gap" in notes(volume)
    assert "IM0003" not in notes(volume)
    good, bad = list_series(folder)
    assert good.skipped is None and good.size[0] == 5
    assert (
        bad.id == "" and bad.skipped.startswith("1 file cannot be read") and "IM0003" in bad.skipped
    )


@pytest.mark.parametrize("tags", [dict(RescaleIntercept=None), dict(RescaleIntercept=0)])
def test_a_missing_intercept_is_made_good_where_it_shows(tmp_path, tags):
    volume = read(tmp_path, series(**tags))
    assert_same(volume)
    assert "no RescaleIntercept; 1024 was subtracted" in notes(volume)


def test_a_missing_intercept_shows_beside_padding(tmp_path):
    """What padding became is no sign of Hounsfield units."""
    images = series(RescaleIntercept=None, PixelPaddingValue=9999)
    expected = HU.copy()
    expected[:, 0] = -1024
    for ds, hu in zip(images, HU):
        stored = (hu.astype(np.int32) + 1024).astype(np.uint16)
        stored[0] = 9999
        ds.PixelData = stored.tobytes()
    assert_same(read(tmp_path, images), expected)


def test_numbers_of_bits_that_nothing_has_are_not_believed(tmp_path):
    images = series()
    for ds in images:
        ds.add_new("BitsStored", "LO", "99999999999")
        ds.PixelPaddingValue = 5
    with pytest.raises(DataError, match="cannot be decoded"):
        read(tmp_path, images)


def test_values_that_are_no_hu_are_refused(tmp_path):
    images = series(RescaleIntercept=0)
    for ds, hu in zip(images, HU):
        ds.PixelData = ((hu + 1024) // 8).astype(np.uint16).tobytes()
    with pytest.raises(DataError, match="no Hounsfield units"):
        read(tmp_path, images)


def test_the_patient_is_in_no_text_of_the_volume(tmp_path):
    images = series(SeriesDescription=f"chest of JANE doe {PATIENT}")
    volume = read(tmp_path, images)
    text = repr((volume.source.description, volume.source.notes)).lower()
    for secret in (*NAME.lower().split("^"), PATIENT.lower()):
        assert secret not in text
    assert volume.source.description.startswith("chest of [")


def test_the_header_of_an_instance(tmp_path):
    volume = read(tmp_path, series())
    header = read_header(volume.source.instances[2])
    assert header.PatientName == NAME and header.PatientID == PATIENT
    assert "PixelData" not in header


def test_a_single_slice(tmp_path):
    volume = read(tmp_path, series()[:1])
    assert_same(volume, HU[:1])
    assert "only 1 slice" in notes(volume)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("CT_small.dcm", (1, 128, 128)),
        ("J2K_pixelrep_mismatch.dcm", (1, 512, 512)),
        ("693_J2KR.dcm", (1, 512, 512)),
        ("explicit_VR-UN.dcm", (1, 512, 512)),
        ("bad_sequence.dcm", (1, 512, 512)),
    ],
)
def test_real_images_are_as_pydicom_reads_them(name, shape):
    """Of those that come with pydicom and pydicom-data."""
    path = pydicom.data.get_testdata_file(name, download=False)
    if path is None:
        pytest.skip("pydicom-data is not installed")
    volume = read_volume(path)
    ds = pydicom.dcmread(path)
    hu = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
    if "PixelPaddingValue" in ds:
        hu[ds.pixel_array == ds.PixelPaddingValue] = -1024
    assert volume.hu.shape == shape
    np.testing.assert_array_equal(volume.in_source(volume.hu)[0], hu)


def test_the_real_dicomdir():
    folder = pydicom.data.get_testdata_file("DICOMDIR", download=False)
    entries = list_series(folder)
    assert [e.id for e in entries if e.skipped is None] == ["5"]
    assert sum((e.skipped or "").startswith("localiser") for e in entries) == 1
    assert sum("MR Image" in (e.skipped or "") for e in entries) == 7
    assert read_volume(folder).hu.shape == (5, 16, 16)
