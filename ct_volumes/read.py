"""A CT scan as a hospital or a data set has it -> `CTVolume`; what series a scan has; what scans a
folder has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ct_volumes import optional
from ct_volumes.volume import CTVolume
from deeplesion.errors import DataError, MissingDataError

NIFTI_ENDINGS = (".nii", ".nii.gz")


@dataclass(frozen=True)
class SeriesEntry:
    """A series of a scan, or the part of one that fits together.

    Attributes:
        id: chooses it (`series=`); so does its number or UID, where they are not of several.
        uid: SeriesInstanceUID, '' where there is none.
        number, description, kernel: as the header states them, without the patient's name.
        size: (slices, rows, columns).
        interval_mm: the usual distance from slice to slice, None of a single one.
        slice_thickness_mm: what the header says.
        skipped: why it is not read by itself; None of a candidate.
    """

    id: str
    uid: str
    number: int | None
    description: str
    kernel: str
    size: tuple[int, int, int]
    interval_mm: float | None
    slice_thickness_mm: float | None
    skipped: str | None


def list_series(path: str | Path) -> list[SeriesEntry]:
    """What `read_volume(path)` chooses from, by the headers alone.

    Files that are missing or cannot be read are an entry at the end, without an id: `skipped` says
    how many, and what is wrong with the first.

    Raises DataError (MissingDataError) where `read_volume` would whatever the series.
    """
    path = _nifti_within(Path(path))
    if is_nifti(path):
        size, interval = _module("nifti_in").nifti_size(path)
        return [SeriesEntry("1", "", None, "", "", size, interval, None, None)]
    found, lost = _module("dicom_in").scan_series(path)
    entries = [
        SeriesEntry(
            id=series.id,
            uid=series.first.series,
            number=series.first.number,
            description=series.first.description,
            kernel=series.first.kernel,
            size=(len(series.frames), series.first.rows, series.first.columns),
            interval_mm=series.interval if series.is_volume else None,
            slice_thickness_mm=series.first.thickness,
            skipped=series.reason,
        )
        for series in found
    ]
    return entries + [
        SeriesEntry("", "", None, "", "", (0, 0, 0), None, None, problem) for problem in lost
    ]


def read_volume(path: str | Path, series: str | None = None) -> CTVolume:
    """Read a CT scan.

    Args:
        path: a DICOM folder (nested, several series, file names of any kind), a zip of one, a
            DICOMDIR, a DICOM file, or a .nii or .nii.gz file.
        series: which one to read, by its id of `list_series`, its number or its UID. By default
            that which `ct_volumes.dicom_choice.choose` takes; `source.notes` says so.

    Raises MissingDataError if nothing is there, and DataError, which says what was found and what
    to do, for what is no CT scan, is damaged, or leaves open what is meant.
    """
    path = _nifti_within(Path(path))
    if not is_nifti(path):
        return _module("dicom_in").read_dicom(path, series)
    if series is not None and str(series) != "1":
        raise DataError(f"{path} has no series {str(series)!r}: a NIfTI file holds one volume, '1'")
    return _module("nifti_in").read_nifti(path)


def find_scans(path: str | Path) -> list[tuple[str, Path]]:
    """The scans under a path: (a name that no other has, the path for `read_volume`).

    A file is one scan. Of a folder, each .nii, .nii.gz and .zip file in it is a scan. A folder with
    DICOM files in it is one; so are several folders together, if all their files are of one study
    (the first file of each folder is looked at). Folders of different studies are scans of their
    own. Names are those of the files without their ending, or of the folders; a deeper one has
    those above it in front. Raises DataError if there is none.
    """
    path = Path(path)
    if not path.exists():
        raise MissingDataError(f"{path} is not there. Expected a CT scan or a folder of scans")
    if not path.is_dir():
        return [(_stem(path), path)]
    found = [child for child in _children(path) if child.is_file() and _is_scan_file(child)]
    dicom = _module("dicom_in")
    for folder, _ in _folders(path, dicom, set()):
        found.append(folder)
    if not found:
        raise DataError(
            f"{path} holds no scan. Expected DICOM files, folders or zips of them, or .nii or"
            " .nii.gz files"
        )
    names = [_stem(each) if each.is_file() else _folder_name(each, path) for each in found]
    whole = [name.casefold() for name in names]
    names = [
        name if whole.count(name.casefold()) == 1 or each == path else _joined(each, path)
        for name, each in zip(names, found)
    ]
    taken: set[str] = set()
    scans = []
    for name, each in sorted(zip(names, found), key=lambda pair: (pair[0], str(pair[1]))):
        unique, count = name, 2
        while unique.casefold() in taken:
            unique, count = f"{name}-{count}", count + 1
        taken.add(unique.casefold())
        scans.append((unique, each))
    return scans


def is_nifti(path: Path) -> bool:
    """By its name."""
    return path.name.lower().endswith(NIFTI_ENDINGS) and not path.is_dir()


def _nifti_within(path: Path) -> Path:
    """The one NIfTI file of a folder that has no other scan in it; any other path as it is."""
    if not path.is_dir():
        if is_nifti(path) and not path.is_file():
            if path.exists():
                raise DataError(f"{path} is no plain file")
            raise MissingDataError(f"{path} is not there. Expected a NIfTI file")
        return path
    files = [child for child in _children(path) if is_nifti(child)]
    if not files or any(_folders(path, _module("dicom_in"), set())):
        return path
    if len(files) > 1:
        raise DataError(
            f"{path} holds {len(files)} NIfTI files, such as {files[0].name}: name the one that is"
            " meant"
        )
    return files[0]


def _folders(folder: Path, dicom: ModuleType, seen: set) -> list[tuple[Path, str]]:
    """The folders in and under `folder` that are a DICOM scan each, with the study's UID."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        return []
    seen.add((status.st_dev, status.st_ino))
    children = _children(folder)
    for child in children:
        study = dicom.study_of(child) if child.is_file() and not _is_scan_file(child) else None
        if study is not None:
            return [(folder, study)]
    found = [each for child in children if child.is_dir() for each in _folders(child, dicom, seen)]
    studies = {study for _, study in found}
    # Studies without a UID cannot be told from each other: they are not put together.
    if len(found) == 1 or (len(studies) == 1 and "" not in studies):
        return [(folder, found[0][1])]
    return found


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from None


def _is_scan_file(path: Path) -> bool:
    return is_nifti(path) or path.suffix.lower() == ".zip"


def _stem(path: Path) -> str:
    for ending in (*NIFTI_ENDINGS[::-1], ".zip", ".dcm"):
        if path.name.lower().endswith(ending) and len(path.name) > len(ending):
            return path.name[: -len(ending)]
    return path.name


def _folder_name(folder: Path, root: Path) -> str:
    return _joined(folder, root) if folder != root else root.resolve().name or "scan"


def _joined(path: Path, root: Path) -> str:
    return "_".join(path.relative_to(root).parts)


def _module(name: str) -> ModuleType:
    return optional.module(name, "reading CT scans")
