"""What a study gives: statistics as JSON, tables, figures, and study.html, which links the report
of every run."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from tqdm import tqdm

from deeplesion.errors import MissingDataError, UserError
from deeplesion.evaluation.evaluate import resampled
from deeplesion.evaluation.results import Result, read_results
from deeplesion.evaluation.study import check_reference, study
from deeplesion.files import write_whole
from deeplesion.report.page import page_of, to_html
from deeplesion.report.study_figures import render_study
from deeplesion.report.study_tables import NOTE, study_tables
from deeplesion.report.tables import Table, as_files, key_slices_note, partial_data, to_text

CAPTIONS = {
    "froc": "FROC: mean of each method's seeds; the band reaches from the lowest seed to the"
    " highest.",
    "thickness": "Thin slices against thick ones: mean and 95 % interval of the method; a dot is a"
    " seed.",
    "differences": "Differences from the reference: mean and 95 % interval of the method; a dot is"
    " a seed's difference from the mean of the reference.",
}
# The files of figures, of which each further test set has its own.
FIGURE = re.compile(rf"({'|'.join(CAPTIONS)})(-\d+)?\.(svg|png)")
READING = (
    "An interval is of the method: it holds for other patients and for other training seeds. The"
    " evaluation of single runs, which the list of runs links where it is kept, has intervals of"
    " one trained model."
)


class SameImages(NamedTuple):
    """Methods that are tested on the same images."""

    results: dict[str, list[Result]]
    statistics: dict
    tables: list[Table]
    title: str


def write_study(
    out: Path,
    methods: Mapping[str, dict],
    reference: str,
    resamples: int = 1000,
    notes: Sequence[str] = (),
) -> str:
    """Writes study.json, .txt, .csv, .md, .tex, .html and the figures; returns what to print.

    Figures that an earlier call left and this one does not draw are removed.

    Args:
        out: folder of the study.
        methods: name -> `config`, `options`, `cost`, `test` (fingerprint of the test), `runs`, each
            with `seed`, `folder` (of results.json.gz, relative to `out`), `training` and `test`.
            A method without runs is named and left out, and a run whose result cannot be read.
        reference: method that the others are compared with. Where it is not among those tested on
            the same images, or has no runs, the first of these is.
        resamples: of the bootstrap over patients.
        notes: what else is to be said of the runs.

    Raises:
        MissingDataError: no method has a run whose result can be read.
        UserError: the reference is none of the methods.
    """
    check_reference(reference, methods)
    results_of, methods, unread = _read(out, methods)
    notes = [*notes, *unread]
    without = [name for name, results in results_of.items() if not results]
    if len(without) == len(methods):
        told = [f"{out}: no run is finished yet, so there is nothing to report", *notes]
        raise MissingDataError("\n".join(told))
    if without:
        notes.append(f"Without a finished run, hence left out: {', '.join(without)}.")
    present = {name: method for name, method in methods.items() if name not in without}
    sets: dict[str, dict[str, list[Result]]] = {}
    for name in present:
        sets.setdefault(_images(results_of[name][0]), {})[name] = results_of[name]
    found = []
    for results in tqdm(
        sets.values(), desc="bootstrap", unit="test set", leave=False, disable=None
    ):
        found.append(_evaluated(results, present, reference, resamples, len(sets) > 1))
    partial = partial_data(runs[0] for each in found for runs in each.results.values())
    notes = [partial, *notes] if partial else notes

    content = dict(
        reference=reference,
        resamples=resamples,
        methods=methods,
        without_runs=without,
        notes=notes,
        test_sets=[dict(title=each.title, **each.statistics) for each in found],
    )
    tables = [table for each in found for table in each.tables]
    files: dict[str, str | bytes] = {
        "study.json": json.dumps(content, indent=1, allow_nan=False) + "\n",
        "study.txt": "\n\n".join([*map(to_text, tables), NOTE, *notes]) + "\n",
        **{f"study.{kind}": text for kind, text in as_files(tables, partial).items()},
    }
    for i, each in enumerate(found):
        mark = f"-{i + 1}" if i else ""
        for name, figure in render_study(each.results, each.statistics, ("svg", "png")).items():
            files[name.replace(".", f"{mark}.")] = figure
    files["study.html"] = _page(out, found, methods, notes, files)
    for name, data in files.items():
        write_whole(out / name, data)
    for path in out.iterdir():
        if FIGURE.fullmatch(path.name) and path.name not in files:
            path.unlink()  # of an earlier call
    lines = [*(to_text(each.tables[0]) for each in found), NOTE, *notes]
    names = dict.fromkeys(name.replace(".svg", ".png") for name in files)
    return "\n\n".join(lines) + f"\n\n{out}: {', '.join(names)}"


def _read(
    out: Path, methods: Mapping[str, dict]
) -> tuple[dict[str, list[Result]], dict[str, dict], list[str]]:
    """The results of each method, the methods with the runs that they are of, and what is said of
    runs whose result cannot be read."""
    results: dict[str, list[Result]] = {}
    kept, unread = {}, []
    for name, method in tqdm(methods.items(), desc="reading results", leave=False, disable=None):
        results[name], runs = [], []
        for run in method["runs"]:
            try:
                results[name].append(read_results(out / run["folder"] / "results.json.gz", name))
                runs.append(run)
            except (UserError, OSError) as error:
                unread.append(
                    f"Left out: {name}, seed {run['seed']}: {error}. Remove {out / run['folder']}:"
                    " the study then tests this run again"
                )
        kept[name] = {**method, "runs": runs}
    return results, kept, unread


def _images(result: Result) -> str:
    """What differs for results of different images, or of other lesions on them."""
    images = {r["file_name"]: [lesion["bbox"] for lesion in r["lesions"]] for r in result.records}
    return json.dumps(images, sort_keys=True)


def _evaluated(
    results: dict[str, list[Result]],
    methods: Mapping[str, dict],
    reference: str,
    resamples: int,
    several: bool,
) -> SameImages:
    """Statistics and tables of one test set."""
    first = next(iter(results.values()))[0]
    statistics = study(
        results, reference if reference in results else next(iter(results)), resamples
    )
    tables = study_tables(statistics, methods, resampled(first))
    counts = f"{len(first.records):,} key slices, {first.curve.num_lesions:,} lesions"
    if not first.unknown_patients:
        counts += f", {len(set(first.patients.tolist())):,} patients"
    if note := key_slices_note(len(first.records), first.table_key_slices):
        counts += f"; {note}"
    if several:
        tables = [
            Table(f"{t.name} ({counts})", f"{counts}: {t.title}", t.labels, t.measures, t.rows)
            for t in tables
        ]
    return SameImages(results, statistics, tables, counts)


def _page(
    out: Path,
    found: Sequence[SameImages],
    methods: Mapping[str, dict],
    notes: Sequence[str],
    files: Mapping[str, str | bytes],
) -> str:
    with_runs = sum(bool(method["runs"]) for method in methods.values())
    runs = sum(len(method["runs"]) for method in methods.values())
    sections = []
    for i, each in enumerate(found):
        mark = f"-{i + 1}" if i else ""
        main, *further = each.tables
        figures = "".join(
            _figure(files[f"{name}{mark}.svg"], name, caption)
            for name, caption in CAPTIONS.items()
            if f"{name}{mark}.svg" in files
        )
        more = "".join(map(to_html, further))
        heading = f"Methods: {each.title}" if len(found) > 1 else "Methods"
        sections.append(
            f"<h2>{escape(heading)}</h2>{to_html(main)}<p>{escape(NOTE)}</p>"
            f'<div class="figures">{figures}</div>'
            f"<details><summary>Operating points, differences and seeds</summary>{more}</details>"
        )
    told = [f"{'; '.join(each.title for each in found)}. {READING}", *notes]
    return page_of(
        "study.html",
        title=f"{with_runs} methods, {runs} runs",
        summary="".join(f"<p>{escape(text)}</p>" for text in told),
        sets="".join(sections),
        runs=_runs(out, methods),
    )


def _figure(svg: bytes, name: str, caption: str) -> str:
    source = "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")
    image = f'<img src="{source}" alt=""><figcaption>{escape(caption)}</figcaption>'
    return f'<figure class="{name}">{image}</figure>'


def _runs(out: Path, methods: Mapping[str, dict]) -> str:
    """The list of runs: what each is, and links to its report and logs, as far as they are here."""
    lines = []
    for name, method in methods.items():
        command = " ".join([method["config"], *method["options"]])
        for i, run in enumerate(method["runs"]):
            folder = Path(run["folder"])
            links = {
                "report": folder / "evaluation/report.html",
                "training": folder.parent / "train.txt",
                "test": folder.parent / "test.txt",
                "note": folder.parent / "run.json",
            }
            linked = " ".join(
                f'<a href="{quote(path.as_posix())}">{text}</a>'
                for text, path in links.items()
                if (out / path).is_file()
            )
            first = ' class="first"' if i == 0 else ""
            again = "" if i == 0 else " again"
            config = f"<code>{escape(command)}</code>" if i == 0 else ""
            lines.append(
                f'<tr{first}><th scope="row" class="text{again}">{escape(name)}</th>'
                f'<td>{run["seed"]}</td><td class="text">{linked}</td>'
                f'<td class="text">{escape(run["training"].get("device", ""))}</td>'
                f'<td class="text wide">{config}</td></tr>'
            )
    head = "".join(
        f'<th scope="col" class="text">{text}</th>'
        for text in ("method", "seed", "files", "trained on", "config and options")
    )
    return (
        '<div class="scroll" role="region" tabindex="0" aria-label="Runs"><table><thead>'
        f"<tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
