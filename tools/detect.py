"""Find lesions in CT scans and measure them:
python tools/detect.py SCAN --config alignshift_7slice --checkpoint work_dirs/x --out lesions"""

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ct_volumes.lesions import Algorithm
from ct_volumes.linking import MIN_SLICE_SCORE, link
from ct_volumes.read import find_scans, list_series, read_volume
from ct_volumes.results_folder import check_writers, is_finished, names_patient, write_results
from ct_volumes.slice_detector import MIN_LESION_SCORE, SliceDetector, check_min_score
from ct_volumes.volume import CTVolume
from deeplesion.command_line import REPORT, command, config_help, sentence, told_to_repeat
from deeplesion.errors import UserError
from deeplesion.evaluation.volume_froc import read_calibration
from deeplesion.lock import only_writer
from deeplesion.processes import termination_interrupts

MOST_ROWS = 20  # of lesions on the console
SLICES = "slices.jsonl"  # what was found on slices: work goes on from there, or is linked anew


class Overrides(argparse.Action):
    """mmdet_ext.config.overrides.Overrides, imported when it is used: an exported detector needs
    no MMDetection."""

    def __call__(self, *arguments) -> None:
        from mmdet_ext.config.overrides import Overrides

        Overrides(self.option_strings, self.dest, self.nargs)(*arguments)


class Scan(NamedTuple):
    """A scan that was read: the name by which it is told, and when the work on it began."""

    volume: CTVolume
    name: str
    began: float

    def told(self, text: str, options: argparse.Namespace) -> str:
        """A text that may hold paths of its files, as it may be printed."""
        return text if options.identify else self.volume.source.without_paths(text)


class Outcome(NamedTuple):
    """What became of a scan: its folder, and in words what was found or what went wrong."""

    name: str
    what: str
    failed: bool = False


@command()
def main() -> int | None:
    options = parse()
    scans = find_scans(options.scan)
    if options.list:
        return list_all(scans)
    if options.series and len(scans) > 1:
        raise UserError(f"--series chooses within one scan, and {options.scan} holds {len(scans)}")
    if options.scan.is_dir() and options.out.resolve().is_relative_to(options.scan.resolve()):
        raise UserError(
            f"--out {options.out} lies in {options.scan}, where the next call would take the"
            " results for scans: give a folder elsewhere"
        )
    check_numbers(options)
    check_writers()
    detector, source = exported(options) if options.model else trained(options)
    detector.check_amp(options.amp)
    algorithm = algorithm_of(detector, options)
    say("detector", f"{detector.name}, {source}")
    say("threshold", threshold_of(algorithm))
    outcomes = []
    with (
        only_writer(options.out / "detect.lock", "--out"),
        told_to_repeat(),
        termination_interrupts(),
    ):
        for number, (name, path) in enumerate(scans, 1):
            if len(scans) == 1:
                detect_in(read(path, name, options), options.out, detector, algorithm, options)
                return None
            print(f"\n{number} of {len(scans)}")
            outcomes.append(attempt(path, name, detector, algorithm, options))
    print("\n" + summary(outcomes))
    return 1 if any(outcome.failed for outcome in outcomes) else None


def trained(options: argparse.Namespace) -> tuple[SliceDetector, str]:
    """The detector of a config and a checkpoint, and what to say of it."""
    from mmdet_ext.engine.predict import LesionDetector

    detector = LesionDetector(
        options.config, options.checkpoint, options.device, options.accept_differences,
        options.cfg_options,
    )  # fmt: skip
    return detector, f"{detector.checkpoint}, on {detector.device}"


def exported(options: argparse.Namespace) -> tuple[SliceDetector, str]:
    """The detector that tools/export.py wrote; of ONNX without an import of torch."""
    from ct_volumes.export_format import read_manifest
    from ct_volumes.exported import ExportedDetector

    if options.device not in (None, "cpu"):
        raise UserError(f"--device {options.device}: an exported detector runs on the cpu")
    manifest = read_manifest(options.model)
    if manifest["kind"] == "onnx":
        from ct_volumes.onnx_program import open_program
    else:
        from mmdet_ext.engine.torch_program import open_program
    detector = ExportedDetector(options.model, open_program, manifest)
    return detector, f"{options.model} ({manifest['kind']}), on cpu"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Find lesions in a CT scan: lesions.json and .csv, a label map (.nii.gz),"
        " report.html, prompts.json, and of DICOM a SEG and an SR. Of a folder of scans each has a"
        " folder of its own in OUT; one that cannot be read does not stop the others. The same"
        " command goes on where it was interrupted, and with another threshold it detects nothing"
        " anew. For research, not a medical device."
    )
    parser.add_argument(
        "scan", type=Path, metavar="SCAN",
        help="DICOM folder or file, zip, DICOMDIR, .nii, .nii.gz, or a folder of scans",
    )  # fmt: skip
    parser.add_argument("--config", help=config_help("config that the checkpoint was trained with"))
    parser.add_argument("--checkpoint", help="a .pth file, or a work directory for its best one")
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER",
        help="instead of these two: what tools/export.py wrote, which needs no MMDetection",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder to write the results to")
    parser.add_argument("--list", action="store_true", help="show the series of SCAN and end")
    parser.add_argument("--series", help="read this series: id in --list, number or UID")
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="MM",
        help="look at a slice every so many mm (default 2.0); if the scan's own lie further apart,"
        " at each of them",
    )  # fmt: skip
    parser.add_argument(
        "--min-score",
        type=float,
        metavar="S",
        help=f"show lesions whose best slice scores at least S (default {MIN_LESION_SCORE}; not"
        f" less than {MIN_SLICE_SCORE})",
    )
    parser.add_argument(
        "--fp-per-scan", type=float, metavar="N",
        help="show instead lesions from the score on at which --calibration has N false positives"
        " a scan",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="calibration.json that tools/evaluate.py --volumes wrote",
    )  # fmt: skip
    parser.add_argument(
        "--device", help="compute on cpu, cuda or cuda:N (default: a GPU if there is one)"
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N",
        help="look at N slices at once (default 4, on a GPU 8)",
    )  # fmt: skip
    parser.add_argument(
        "--amp", action="store_true", help="compute in half precision, on a GPU alone"
    )
    parser.add_argument(
        "--accept-differences",
        action="store_true",
        help="use the checkpoint even if it was trained as another network than the config's",
    )
    parser.add_argument(
        "--identify", action="store_true",
        help="say in JSON, page and folder names whose scan it is; else nothing there does",
    )  # fmt: skip
    parser.add_argument(
        "--cfg-options", nargs="+", action=Overrides, metavar="k=v", help="override the config"
    )
    options = parser.parse_args()
    of_network = {"--config": options.config, "--checkpoint": options.checkpoint}
    others = {
        "--accept-differences": options.accept_differences or None,
        "--cfg-options": options.cfg_options,
    }
    if options.model and (given := [k for k, v in (of_network | others).items() if v is not None]):
        parser.error(f"--model says what the detector is: leave out {', '.join(given)}")
    needed = {**({} if options.model else of_network), "--out": options.out}
    missing = [name for name, value in needed.items() if value is None]
    if missing and not options.list:
        parser.error(f"needed to detect lesions: {', '.join(missing)}")
    return options


def check_numbers(options: argparse.Namespace) -> None:
    """Raises UserError for options that cannot be."""
    if not 0 < options.interval < np.inf:
        raise UserError(f"--interval must be a positive number of mm, got {options.interval}")
    if options.batch_size is not None and options.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {options.batch_size}")
    if (options.fp_per_scan is None) != (options.calibration is None):
        raise UserError("--fp-per-scan and --calibration belong together: give both or neither")
    if options.fp_per_scan is not None and options.min_score is not None:
        raise UserError("give --min-score or --fp-per-scan, not both")
    if options.min_score is not None:
        check_min_score(options.min_score, "--min-score")


def algorithm_of(detector: SliceDetector, options: argparse.Namespace) -> Algorithm:
    """What is written of the detector; its option `min_score` is the least score of a lesion.

    Raises UserError for a calibration of another detector or other options.
    """
    deciding = dict(
        interval_mm=options.interval, amp=options.amp, network_sha256=detector.network_sha256
    )
    if options.calibration is None:
        score = MIN_LESION_SCORE if options.min_score is None else options.min_score
        return detector.algorithm(dict(min_score=score, **deciding))
    calibration = read_calibration(options.calibration)
    measured = calibration.algorithm
    now = dict(checkpoint_sha256=detector.checkpoint_sha256, **deciding)
    was = dict(measured.get("options") or {}, checkpoint_sha256=measured.get("checkpoint_sha256"))
    differ = [f"{k} {was.get(k)}, now {v}" for k, v in now.items() if was.get(k) != v]
    if differ:
        raise UserError(
            f"{options.calibration} was measured otherwise ({'; '.join(differ)}): detect as there,"
            " or calibrate again"
        )
    score = calibration.score_at(options.fp_per_scan)
    return detector.algorithm(
        dict(min_score=float(score), fp_per_scan=options.fp_per_scan, **deciding)
    )


def threshold_of(algorithm: Algorithm) -> str:
    score, rate = algorithm.options["min_score"], algorithm.options.get("fp_per_scan")
    return f"score {score:.4g}" + ("" if rate is None else f", {rate:g} false positives a scan")


def attempt(
    path: Path,
    name: str,
    detector: SliceDetector,
    algorithm: Algorithm,
    options: argparse.Namespace,
) -> Outcome:
    """One scan of several: whatever is wrong with it, the others follow."""
    scan = None
    try:
        scan = read(path, name, options)
        return detect_in(scan, options.out / scan.name, detector, algorithm, options)
    except (UserError, OSError, MemoryError) as error:
        trace, text = "", sentence(error)
    except Exception as error:
        trace, text = traceback.format_exc(), f"{type(error).__name__}: {error}. {REPORT}"
    if scan:
        name, trace, text = scan.name, scan.told(trace, options), scan.told(text, options)
    print(trace, end="", file=sys.stderr)
    say("failed", f"{name}: {text}")
    return Outcome(name, text, failed=True)


def read(path: Path, name: str, options: argparse.Namespace) -> Scan:
    """Without --identify a name that would tell the patient's is replaced by a number that is the
    scan's own."""
    began = time.monotonic()
    volume = read_volume(path, options.series)
    if not options.identify and names_patient(name, volume):
        name = f"scan_{volume.sha256[:8]}"
    return Scan(volume, name, began)


def detect_in(
    scan: Scan,
    out: Path,
    detector: SliceDetector,
    algorithm: Algorithm,
    options: argparse.Namespace,
) -> Outcome:
    """Detects in one scan and writes its files to the folder `out`."""
    volume, name, began = scan
    say("scan", f"{name}: {size_of(volume)}")
    for note in volume.source.notes:
        say("", scan.told(note, options))
    if is_finished(out, volume, algorithm, options.identify):
        say("finished", f"before, {out}")
        return Outcome(name, "finished before")
    found = detector.detect_slices(
        volume, options.interval, options.batch_size, options.amp, store=out / SLICES,
        least_score=MIN_SLICE_SCORE,
    )  # fmt: skip
    min_score = algorithm.options["min_score"]
    lesions = link(found, volume, lesion_score=min_score)
    written, notes = write_results(out, lesions, volume, algorithm, options.identify)
    seconds = time.monotonic() - began
    say("looked at", f"{len(found)} slices, {seconds:.0f} s in all")
    say("lesions", table(lesions, min_score))
    for note in notes:
        say("", scan.told(note, options))
    say("files", f"{out}: {', '.join(written)}")
    return Outcome(name, f"{len(lesions)} lesions, {seconds:.0f} s")


def size_of(volume: CTVolume) -> str:
    slices, rows, columns = volume.hu.shape
    row, column = volume.spacing_mm
    interval = f"every {np.median(volume.interval_mm):.4g} mm, " if slices > 1 else ""
    return f"{slices} slices of {rows} x {columns}, {interval}pixels of {row:.4g} x {column:.4g} mm"


def table(lesions: list, min_score: float) -> str:
    if not lesions:
        return f"none with a score of {min_score:.4g} or more"
    lines = [f"{len(lesions)}", " number  score  slice  long x short mm  volume mm3"]
    for number, lesion in enumerate(lesions[:MOST_ROWS], 1):
        long, short = lesion.diameters_mm
        lines.append(
            f" {number:>6}  {lesion.score:.3f}  {lesion.recist_index:>5}"
            f"  {f'{long:.1f} x {short:.1f}':>15}  {lesion.volume_mm3:>10,.0f}"
        )
    if len(lesions) > MOST_ROWS:
        lines.append(f" and {len(lesions) - MOST_ROWS} more, see lesions.csv")
    return "\n".join(lines)


def summary(outcomes: list[Outcome]) -> str:
    width = max(len(outcome.name) for outcome in outcomes)
    lines = [f"{o.name:<{width}}  {'FAILED: ' if o.failed else ''}{o.what}" for o in outcomes]
    failed = sum(outcome.failed for outcome in outcomes)
    return "\n".join([*lines, f"{len(outcomes)} scans, {failed} failed"])


def list_all(scans: list[tuple[str, Path]]) -> int | None:
    """The series of each scan; one whose series cannot be listed does not stop the others."""
    failed = False
    for name, path in scans:
        if len(scans) == 1:
            return print_series(path)
        print(f"\n{name}")
        try:
            print_series(path)
        except (UserError, OSError, MemoryError) as error:
            failed = True
            print(sentence(error))
    return 1 if failed else None


def print_series(path: Path) -> None:
    """A line for each series of a scan, those that are not read by themselves with the reason."""
    rows = [("id", "slices", "size", "interval", "thickness", "kernel", "description", "")]
    for each in list_series(path):
        slices, height, width = each.size
        rows.append(
            (
                each.id, str(slices), f"{height} x {width}", millimetres(each.interval_mm),
                millimetres(each.slice_thickness_mm), each.kernel, each.description,
                f"skipped: {each.skipped}" if each.skipped else "",
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths)]
        print("  ".join([*cells, row[-1]]).rstrip())


def millimetres(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g} mm"


def say(what: str, text: object) -> None:
    head, *rest = str(text).split("\n")
    print("\n".join([f"{what:<12}{head}", *(f"{'':<12}{line}" for line in rest)]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
