"""One page for one or several results, report.html: tables, curves, and a gallery of false
positives, missed lesions and hits. It opens from disk, needs no network and says what it leaves
out."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from deeplesion.data.slices import SliceFolder
from deeplesion.evaluation.results import Result
from deeplesion.files import write_whole
from deeplesion.report.figures import render_figures, write_figures
from deeplesion.report.gallery import KINDS, collect
from deeplesion.report.pictures import COLOURS, TRUTH
from deeplesion.report.tables import (
    Number,
    Table,
    all_tables,
    partial_data,
    published_tables,
)
from deeplesion.report.template import fill, script_json

__all__ = ["write_figures", "write_report"]

EXAMPLES = 200
FOLDER = Path(__file__).parent


def write_report(
    results: Sequence[Result],
    evaluations: Sequence[dict],
    out_dir: Path,
    folder: SliceFolder | None = None,
    published: bool = False,
    comparisons: Sequence[dict] = (),
    examples: int = EXAMPLES,
) -> Path:
    """Write report.html, one file with all that it shows.

    Args:
        results: one or several.
        evaluations: of each of them, by `evaluate.evaluate`.
        out_dir: made if it is not there.
        folder: where the slices are; None for a gallery of outlines without pictures.
        published: with the tables of the papers, apart from one's own.
        comparisons: of `evaluate.compare`.
        examples: findings of each kind and model in the gallery at most (see `gallery.collect`);
            with slices one takes about 20 kB.

    Returns:
        the path of the page.

    Raises:
        ValueError: not one evaluation a result, or a negative number of examples.
        FileNotFoundError: a slice is missing.
    """
    names = [result.name for result in results]
    if not names or names != [evaluation["name"] for evaluation in evaluations]:
        raise ValueError(
            f"expected the evaluations of the results {names} in their order, got those of"
            f" {[evaluation['name'] for evaluation in evaluations]}"
        )
    if examples < 0:
        raise ValueError(f"examples must be at least 0, got {examples}")
    settings = evaluations[0]["settings"]
    figures = render_figures(results, ("svg",), settings["resamples"], settings["seed"])
    gallery = [collect(result, examples, folder) for result in results]
    main, *further = all_tables(evaluations, comparisons)
    averages = ", ".join(
        f"{e['name']} {e['froc'][0]['average']:.1f} %"
        for e in evaluations
        if e["froc"][0]["average"] is not None
    )
    page = page_of(
        "report.html",
        title=escape(" · ".join(names)),
        colours=_colours(),
        summary=_summary(results, settings),
        sensitivity=to_html(main) + (_published() if published else ""),
        froc=_figure(figures.get("froc.svg"), f"FROC curves with 95 % bands; averages: {averages}"),
        groups=_figure(
            figures.get("groups.svg"), "Average sensitivity by slice thickness and lesion size"
        ),
        further="".join(map(to_html, further)),
        gallery_note=_gallery_note(names, gallery, examples, folder),
        data=script_json(dict(models=names, kinds=KINDS, gallery=gallery)),
    )
    path = Path(out_dir) / "report.html"
    write_whole(path, page)
    return path


def page_of(template: str, **parts: str) -> str:
    """A template of this folder, filled with its parts and, as {{style}}, what all pages share."""
    text, style = (FOLDER.joinpath(name).read_text("utf-8") for name in (template, "page.css"))
    return fill(text, style=style, **parts)


def to_html(table: Table, kind: str = "") -> str:
    """A table that scrolls where the window is narrow; intervals stand beneath their numbers."""
    noted = any(row.note for row in table.rows)
    columns = len(table.labels) + len(table.measures) + noted
    texts = [
        not all(isinstance(row.labels[i], int) for row in table.rows)
        for i in range(len(table.labels))
    ]
    body, above = [], None
    for row in table.rows:
        if row.section and (above is None or row.section != above.section):
            section = f'<th scope="colgroup" colspan="{columns}">{escape(row.section)}</th>'
            body.append(f'<tr class="section">{section}</tr>')
        again = above is not None and row.labels[0] == above.labels[0]
        cells = [
            f'<th scope="row"{_class("text" * text, "again" * (again and i == 0))}>'
            f"{escape(f'{label:,}' if isinstance(label, int) else label)}</th>"
            for i, (label, text) in enumerate(zip(row.labels, texts))
        ]
        cells += [f"<td>{_number(number)}</td>" for number in row.numbers]
        cells += [f'<td class="text note">{escape(row.note)}</td>'] * noted
        body.append(f"<tr{_class('' if again else 'first')}>{''.join(cells)}</tr>")
        above = row
    head = [
        f'<th scope="col"{_class("text" * text)}>{escape(name)}</th>'
        for name, text in zip(
            [*table.labels, *table.measures, *["note"] * noted],
            [*texts, *[False] * len(table.measures), True],
        )
    ]
    title = escape(table.title)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{title}">'
        f"<table{_class(kind)}><caption><span>{title}</span></caption>"
        f"<thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _number(number: Number) -> str:
    beneath = [f"[{', '.join(number.ends)}]"] if number.ends else []
    beneath += [escape(number.p_text)] if number.p_text else []
    return number.text + "".join(f"<small>{text}</small>" for text in beneath)


def _class(*names: str) -> str:
    """' class="..."' of the names that are not empty, or nothing."""
    return f' class="{" ".join(filter(None, names))}"' if any(names) else ""


def _published() -> str:
    tables = published_tables()
    count = sum(len(table.rows) for table in tables)
    summary = f"Published numbers, not measured here: {count} rows of the papers"
    content = "".join(to_html(table, "published") for table in tables)
    return f"<details><summary>{summary}</summary>{content}</details>"


def _colours() -> str:
    """The colours of the pictures as CSS variables."""
    names = {"truth": TRUTH, **{name.replace(" ", "-"): bgr for name, bgr in COLOURS.items()}}
    return " ".join(f"--{name}: rgb({r}, {g}, {b});" for name, (b, g, r) in names.items())


def _summary(results: Sequence[Result], settings: dict) -> str:
    """What was evaluated, and how; results may be of different images."""
    counts = {
        "key slices": [len(result.records) for result in results],
        "lesions": [result.curve.num_lesions for result in results],
    }
    if not any(result.unknown_patients for result in results):
        counts["patients"] = [len(set(result.patients.tolist())) for result in results]
    told = ", ".join(
        f"{' / '.join(f'{number:,}' for number in dict.fromkeys(numbers))} {what}"
        for what, numbers in counts.items()
    )
    width = "x2 - x1 + 1 wide, as for the published tables" if settings["pixel_offset"] else (
        "x2 - x1 wide"
    )  # fmt: skip
    partial = partial_data(results)
    warning = f"<p><strong>{escape(partial)}</strong></p>" if partial else ""
    models = "".join(
        f"<p>{escape(result.name)}: weights {escape(result.model['checkpoint'])} (SHA-256"
        f" {escape(result.model['checkpoint_sha256'][:12])}), config"
        f" {escape(result.model['config'])}.</p>"
        for result in results
        if result.model
    )
    return (
        f"{warning}<p>{told}. A detection hits a lesion where their boxes overlap with an IoU of at"
        f" least {settings['iou_threshold']:g} (a box is {width}). Intervals: 95 %, bootstrap over"
        f" {settings['resampled']}, {settings['resamples']:,} resamples, seed {settings['seed']}."
        f"</p>{models}"
    )


def _figure(svg: bytes | None, text: str) -> str:
    if svg is None:
        return "<p>There are no lesions in these images, hence no curve.</p>"
    source = "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")
    return f'<figure><img src="{source}" alt="{escape(text)}"></figure>'


def _gallery_note(
    names: Sequence[str], gallery: Sequence[dict], examples: int, folder: SliceFolder | None
) -> str:
    scores = ", ".join(
        f"{escape(name)} "
        + ("none" if found["threshold"] is None else f"{found['threshold']:.3f} and above")
        for name, found in zip(names, gallery)
    )
    note = (
        "Each model is shown at the score at which it has one false positive per image"
        f" ({scores}): a lesion that only detections of a lower score reach is missed."
    )
    if any(count > examples for found in gallery for count in found["counts"].values()):
        note += (
            f" Of each model and kind at most {examples:,} findings are in this page: the false"
            " positives and hits of the highest scores, the largest of the missed lesions."
        )
    if folder is None:
        note += " The page was made without the slices: outlines only."
    return f"<p>{note}</p>"
