"""JSON, CSV and prompts: what stands in them is what the lesions are, in the volume's grid, in the
source's and in mm; nothing of the patient; what is read back is checked."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pycocotools import mask as coco_mask

from ct_volumes.lesions import Algorithm, Lesion, LesionSlice, Patch, SliceDetections
from ct_volumes.linking import link
from ct_volumes.tables_out import CSV_COLUMNS, read_json, write_csv, write_json, write_prompts
from ct_volumes.volume import CTVolume, Instance, Source
from deeplesion.errors import DataError, MissingDataError, WriteError

ALGORITHM = Algorithm("alignshift_3slice", "0.1.0", "ab" * 32, {"interval_mm": 2.0})
SHAPE = (6, 20, 24)
SECRETS = ("Doe", "Jane", "PAT-4711", "19580203", "ACC-99", "St. Elsewhere", "secret_folder")


def volume(path=Path("secret_folder/Doe"), format="dicom", axes=(0, 2, 1), frames=False, **source):
    """Slices of uneven spacing; the source's are transposed, their rows against the volume's."""
    positions = np.append(0, np.cumsum([2.0, 2.0, 3.0, 2.0, 2.0]))
    origins = np.stack([0 * positions - 20, 0 * positions - 30, 100 - positions], axis=1)
    instances = tuple(
        Instance(path / f"Jane{k}", "1.2.9" if frames else f"1.2.{k}", frame=k if frames else None)
        for k in range(SHAPE[0])
    )
    source = dict(dict(instances=instances, flipped=(False, True, False)), **source)
    shape = tuple(SHAPE[axes.index(a)] for a in range(3))
    source = Source(path, format, shape, axes, notes=(f"{path} has a gap",), **source)
    return CTVolume(np.zeros(SHAPE, np.int16), origins, (1, 0, 0), (0, 1, 0), (0.8, 0.5), source)


def lesion(score=0.9, first=1, left=4, top=6):
    masks = np.zeros((3, *SHAPE[1:]), bool)
    masks[:, top : top + 5, left : left + 9] = True
    masks[0, top, left] = False
    slices = tuple(
        LesionSlice(
            first + k,
            np.array([left - 0.25, top, left + 8.5, top + 4 + 0.25 * k]),
            None if k == 1 else score - 0.1 * k,
            Patch.of(mask),
        )
        for k, mask in enumerate(masks)
    )
    recist = np.array([[left, top + 2], [left + 8, top + 2], [left + 4, top], [left + 4, top + 4]])
    diameters = np.array([4.0, 3.2])
    return Lesion(score, slices, 123.4567, np.array([1.0, 2, 3]), recist, first, diameters)


def written(tmp_path, scan, found, **options):
    path = tmp_path / "lesions.json"
    write_json(path, found, scan, ALGORITHM, **options)
    return read_json(path)


def test_a_written_score_is_a_threshold_that_its_lesion_reaches(tmp_path):
    scan, box = volume(), np.array([[3.0, 3, 12, 12]])
    for score in np.random.default_rng(0).uniform(0.1, 1, 20).astype(np.float32):
        detections = [SliceDetections(2, box, np.array([score]))]
        (each,) = written(tmp_path, scan, link(detections, scan))["lesions"]
        assert each["score"] == each["slices"][0]["score"] == score
        assert len(link(detections, scan, lesion_score=each["score"])) == 1
        assert not link(detections, scan, lesion_score=np.nextafter(each["score"], 2))


def test_json_holds_the_lesions(tmp_path):
    scan, found = volume(), [lesion(), lesion(0.4, first=2, left=12)]
    content = written(tmp_path, scan, found)
    assert [each["number"] for each in content["lesions"]] == [1, 2]
    for each, truth in zip(content["lesions"], found):
        assert each["score"] == truth.score and each["volume_mm3"] == 123.457
        assert each["box"] == truth.box.tolist()
        assert each["diameters_mm"] == [4.0, 3.2] and each["centroid_mm"] == [1.0, 2.0, 3.0]
        assert each["best_slice"] == truth.first
        assert [s["slice"] for s in each["slices"]] == [truth.first + k for k in range(3)]
        assert [s["detected"] for s in each["slices"]] == [True, False, True]
        labels = truth.labels(SHAPE)
        for s in each["slices"]:
            assert (coco_mask.decode(s["mask"]) == labels[s["slice"]]).all()
        x, y = truth.recist.T
        np.testing.assert_allclose(
            each["recist"]["points_mm"], scan.to_world(x, y, truth.recist_index), atol=1e-3
        )
        assert each["recist"]["points"] == truth.recist.tolist()
        assert each["recist"]["slice"] == truth.recist_index
    assert content["algorithm"]["checkpoint_sha256"] == "ab" * 32
    assert content["algorithm"]["options"] == {"interval_mm": 2.0}
    assert "not a medical device" in content["notice"]
    assert content["scan"]["intervals_mm"] == [2, 2, 3, 2, 2]


def test_places_in_the_files_of_the_source(tmp_path):
    """The source's rows are the volume's columns, and its columns its rows, backwards."""
    each = written(tmp_path, volume(), [lesion()])["lesions"][0]
    assert [s["sop_instance_uid"] for s in each["slices"]] == ["1.2.1", "1.2.2", "1.2.3"]
    assert "frame_number" not in each["slices"][0]
    x1, y1, x2, y2 = each["slices"][0]["box"]
    assert each["slices"][0]["source_box"] == [19 - y2, x1, 19 - y1, x2]
    assert each["recist"]["source_points"][0] == [19 - 8, 4]
    each = written(tmp_path, volume(frames=True), [lesion()])["lesions"][0]
    assert [s["frame_number"] for s in each["slices"]] == [2, 3, 4]
    assert {s["sop_instance_uid"] for s in each["slices"]} == {"1.2.9"}


def test_places_in_a_nifti_are_voxels(tmp_path):
    scan = volume(
        format="nifti", axes=(2, 1, 0), flipped=(True, False, True), instances=(), affine=np.eye(4)
    )
    content = written(tmp_path, scan, [lesion()])
    each = content["lesions"][0]
    assert content["scan"]["affine_ras"] == np.eye(4).tolist()
    assert each["recist"]["source_points"][0] == [23 - 4, 8, 5 - 1]
    x1, y1, x2, y2 = each["slices"][0]["box"]
    assert each["slices"][0]["source_box"] == [23 - x2, y1, 4, 23 - x1, y2, 4]
    assert "sop_instance_uid" not in each["slices"][0]


def test_csv_has_a_row_a_lesion(tmp_path):
    write_csv(tmp_path / "a.csv", [lesion(), lesion(0.4)], volume(), ALGORITHM)
    header, first, second = list(csv.reader((tmp_path / "a.csv").open()))
    assert tuple(header) == CSV_COLUMNS
    row = dict(zip(header, first, strict=True))
    assert (row["number"], row["score"], row["volume_mm3"]) == ("1", "0.9", "123.457")
    assert (row["first_slice"], row["last_slice"], row["recist_slice"]) == ("1", "3", "1")
    assert (float(row["long_mm"]), float(row["short_mm"])) == (4.0, 3.2)
    assert [float(row[f"long_{p}"]) for p in ("x1", "y1", "x2", "y2")] == [4, 8, 12, 8]
    assert row["recist_sop_instance_uid"] == "1.2.1" and row["recist_frame_number"] == ""
    assert second[:2] == ["2", "0.4"]
    write_csv(tmp_path / "none.csv", [], volume(), ALGORITHM)
    assert (tmp_path / "none.csv").read_text().count("\n") == 1


@pytest.mark.parametrize("format", ["dicom", "nifti"])
def test_prompts_lie_in_the_grid_of_the_label_map(tmp_path, format):
    """The box is that of the labels, for boxes that enclose their masks by less than a pixel."""
    nibabel = pytest.importorskip("nibabel")
    from ct_volumes.nifti_out import write_nifti

    scan = volume(format=format, affine=np.diag([2.0, 2, 2, 1]) if format == "nifti" else None)
    found = [lesion(), lesion(0.4, first=3, left=15, top=0)]
    write_prompts(tmp_path / "prompts.json", found, scan, ALGORITHM)
    write_nifti(tmp_path / "a.nii.gz", found, scan, ALGORITHM)
    labels = np.asarray(nibabel.load(tmp_path / "a.nii.gz").dataobj)
    prompts = json.loads((tmp_path / "prompts.json").read_text())
    assert list(prompts) == ["1", "2"]
    for number, prompt in prompts.items():
        voxels = np.argwhere(labels == int(number))
        low, high = np.array(prompt["box"][:3]), np.array(prompt["box"][3:])
        assert (low <= voxels.min(axis=0)).all() and (high >= voxels.max(axis=0)).all()
        assert (voxels.min(axis=0) - low <= 1).all() and (high - voxels.max(axis=0) <= 1).all()
        assert (low >= 0).all() and (high < labels.shape).all()
        assert labels[tuple(prompt["point"])] == int(number)


def test_the_point_of_a_crescent_lies_in_it(tmp_path):
    y, x = np.mgrid[: SHAPE[1], : SHAPE[2]]
    mask = np.hypot(x - 10, y - 10) < 8
    mask &= np.hypot(x - 13, y - 10) >= 7
    each = LesionSlice(2, np.array([2.0, 2, 18, 18]), 0.5, Patch.of(mask))
    found = Lesion(0.5, (each,), 1.0, np.zeros(3), np.zeros((4, 2)), 2, np.ones(2))
    scan = volume(format="nifti", axes=(0, 1, 2), flipped=(False,) * 3, affine=np.eye(4))
    write_prompts(tmp_path / "prompts.json", [found], scan, ALGORITHM)
    k, j, i = json.loads((tmp_path / "prompts.json").read_text())["1"]["point"]
    assert mask[j, i] and k == 2


def test_nothing_of_the_patient_unless_asked_for(tmp_path):
    folder = tmp_path / "secret_folder" / "Doe"
    folder.mkdir(parents=True)
    header = pydicom.Dataset()
    header.PatientName, header.PatientID, header.PatientBirthDate = "Doe^Jane", "PAT-4711", ""
    header.AccessionNumber, header.InstitutionName = "ACC-99", "St. Elsewhere"
    header.SOPClassUID, header.SOPInstanceUID = pydicom.uid.CTImageStorage, "1.2.0"
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.save_as(folder / "Jane0", enforce_file_format=True)
    scan = volume(folder, description="Doe, Jane: chest", series_uid="1.2.3")

    out = tmp_path / "out"
    write_json(out / "a.json", [lesion()], scan, ALGORITHM)
    write_csv(out / "a.csv", [lesion()], scan, ALGORITHM)
    write_prompts(out / "b.json", [lesion()], scan, ALGORITHM)
    for path in out.iterdir():
        content = path.read_bytes()
        assert not [secret for secret in SECRETS if secret.encode() in content], path
    assert read_json(out / "a.json")["scan"]["notes"] == ["the scan has a gap"]

    content = written(tmp_path, scan, [lesion()], identify=True)
    assert content["scan"]["patient"]["name"] == "Doe^Jane"
    assert content["scan"]["patient"]["id"] == "PAT-4711"
    assert content["scan"]["patient"]["birth_date"] == ""
    assert content["scan"]["path"] == str(folder)


def test_numbers_that_are_none_are_refused(tmp_path):
    bad = lesion()
    object.__setattr__(bad, "volume_mm3", float("nan"))
    for write in (write_json, write_csv):
        with pytest.raises(ValueError, match="finite"):
            write(tmp_path / "a", [bad], volume(), ALGORITHM)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [write_json, write_csv, write_prompts])
def test_a_failing_write_leaves_what_was_there(tmp_path, monkeypatch, write):
    path = tmp_path / "a"
    path.write_bytes(b"before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(WriteError, match="full"):
        write(path, [lesion()], volume(), ALGORITHM)
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_no_lesions_and_one_slice(tmp_path):
    assert written(tmp_path, volume(), [])["lesions"] == []
    source = Source(Path("scan"), "nifti", (1, 4, 4), affine=np.eye(4))
    hu = np.zeros((1, 4, 4), np.int16)
    scan = CTVolume(hu, np.zeros((1, 3)), (1, 0, 0), (0, 1, 0), (1, 1), source)
    assert written(tmp_path, scan, [])["scan"]["intervals_mm"] == []


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(format="coco"), "format"),
        (lambda c: c.update(format_version=2), "format_version 2"),
        (lambda c: c["scan"].update(shape=[1, 2]), "shape"),
        (lambda c: c.update(lesions={}), "list"),
        (lambda c: c["lesions"].append(3), "lesion 2: it must be"),
        (lambda c: c["lesions"][0].update(number=2), "number"),
        (lambda c: c["lesions"][0].update(score=1.5), "score"),
        (lambda c: c["lesions"][0].update(score=True), "score"),
        (lambda c: c["lesions"][0].update(box=[1, 2, 3]), "box"),
        (lambda c: c["lesions"][0]["box"].__setitem__(5, 99), "0..5"),
        (lambda c: c["lesions"][0]["box"].__setitem__(2, 1.5), "whole"),
        (lambda c: c["lesions"][0].update(volume_mm3=-1), "volume_mm3"),
        (lambda c: c["lesions"][0].update(centroid_mm=None), "centroid_mm"),
        (lambda c: c["lesions"][0]["slices"].pop(), "slices"),
        (lambda c: c["lesions"][0]["slices"][0].update(box="x"), "box"),
        (lambda c: c["lesions"][0]["slices"][0]["mask"].update(counts="zz"), "mask"),
        (lambda c: c["lesions"][0]["slices"][0].update(mask=None), "mask"),
        (lambda c: c["lesions"][0]["slices"][0]["mask"].update(size=[24, 20]), "mask"),
    ],
)
def test_what_is_read_is_checked(tmp_path, change, message):
    content = written(tmp_path, volume(), [lesion()])
    change(content)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        read_json(path)
    assert "bad.json" in str(caught.value)


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(MissingDataError, match=r"no\.json"):
        read_json(tmp_path / "no.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_tables_need_none_of_the_libraries_of_ct_scans():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['pydicom', 'highdicom', 'nibabel']));"
        " import ct_volumes.tables_out"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
