"""What is left of a scan in its folder: the files of its lesions, the last of which marks that it
is finished; and a name for the folder that tells nobody's."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

from ct_volumes import optional
from ct_volumes.lesions import Algorithm, Lesion
from ct_volumes.volume import CTVolume
from deeplesion.errors import DataError

LAST = "lesions.json"
SEG = "lesions.seg.dcm"
SR = "lesions.sr.dcm"
# Options that choose among lesions. With others, what was found on slices is linked anew.
THRESHOLD = {"min_score", "fp_per_scan"}
MODULES = ("tables_out", "nifti_out", "seg_out", "sr_out", "page")


def check_writers() -> None:
    """Raises UserError where a library is missing that the files are written with."""
    for name in MODULES:
        _module(name)


def write_results(
    folder: Path,
    lesions: Sequence[Lesion],
    volume: CTVolume,
    algorithm: Algorithm,
    identify: bool = False,
) -> tuple[list[str], list[str]]:
    """Writes all files of a scan's lesions, lesions.json last.

    A DICOM SEG and SR are written of DICOM scans alone, a SEG only where there are lesions.

    Args:
        identify: JSON and page say whose scan it is.

    Returns the names of the files, and sentences on what could not be written or held.

    Raises what the writers do, but for a SEG or SR that the scan cannot have.
    """
    tables, content = _module("tables_out"), (lesions, volume, algorithm)
    written, notes = [], []
    (folder / LAST).unlink(missing_ok=True)  # of another threshold, or of other `identify`
    tables.write_csv(folder / "lesions.csv", *content)
    tables.write_prompts(folder / "prompts.json", *content)
    notes += _module("nifti_out").write_nifti(folder / "lesions.nii.gz", *content) or ()
    written += ["lesions.csv", "prompts.json", "lesions.nii.gz"]
    for name in (SEG, SR):  # of an earlier try
        (folder / name).unlink(missing_ok=True)
    if volume.source.format == "dicom":
        seg, sr = folder / SEG, folder / SR
        try:
            if _module("seg_out").write_seg(seg, *content):
                written.append(SEG)
        except DataError as error:
            notes.append(f"there is no {SEG}: {error}")
        try:
            _module("sr_out").write_sr(sr, *content, seg=seg if seg.is_file() else None)
            written.append(SR)
        except DataError as error:
            notes.append(f"there is no {SR}: {error}")
    _module("page").write_page(folder / "report.html", *content, identify=identify)
    tables.write_json(folder / LAST, *content, identify=identify)
    return [LAST, *written, "report.html"], notes


def is_finished(
    folder: Path, volume: CTVolume, algorithm: Algorithm, identify: bool = False
) -> bool:
    """Whether a folder has the lesions that this algorithm, with its options, finds in this scan,
    and says whose scan it is just if `identify`. Those of another threshold, and those that say
    more or less, may be written over.

    Raises DataError where it has others: they are not written over.
    """
    path = folder / LAST
    if not path.exists():
        return False
    content = _module("tables_out").read_json(path)
    found = _flat(content["algorithm"] | dict(scan=content["scan"].get("sha256")))
    wanted = _flat(json.loads(json.dumps(asdict(algorithm))) | dict(scan=volume.sha256))
    differ = {name for name in {*found, *wanted} if found.get(name) != wanted.get(name)}
    if differ <= THRESHOLD:
        return not differ and ("path" in content["scan"]) == identify
    told = "; ".join(f"{n} {found.get(n)}, now {wanted.get(n)}" for n in sorted(differ))
    raise DataError(f"{folder} holds other lesions ({told}). Give another --out, or delete {path}")


def _flat(algorithm: dict) -> dict:
    return {k: v for k, v in algorithm.items() if k != "options"} | (algorithm["options"] or {})


def names_patient(text: str, volume: CTVolume) -> bool:
    """Whether a text holds the patient's name, a part of it, or their number, as the header of a
    DICOM scan states them. Of NIfTI, which states none, False."""
    if volume.source.format != "dicom" or not volume.source.instances:
        return False
    header = _module("dicom_in").read_header(volume.source.instances[0])
    stated = [str(header.get(keyword) or "") for keyword in ("PatientName", "PatientID")]
    words = set(re.findall(r"\w+", text.casefold().replace("_", " ")))
    flat = "".join(re.findall(r"[^\W_]", text.casefold()))
    secrets = {word for each in stated for word in re.split(r"[\W_]+", each.casefold()) if word}
    secrets |= {"".join(re.findall(r"[^\W_]", each.casefold())) for each in stated} - {""}
    # Short ones, such as a number of two digits, are within many words.
    return any(s in flat if len(s) > 3 else s in words for s in secrets)


def _module(name: str) -> ModuleType:
    return optional.module(name, "writing lesions")
