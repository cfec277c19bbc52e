"""The numbers of `deeplesion.evaluation` as tables: for the terminal, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from deeplesion.evaluation.evaluate import NUMBER_COLUMNS, POINTS, TABLES
from deeplesion.evaluation.results import Result
from deeplesion.files import write_whole
from deeplesion.report.published import PUBLISHED

AVERAGE = "Avg.[0.5,1,2,4]"
OWN_IMAGES = "sensitivity (%) at false positives per image, each group of its own images"
ALL_IMAGES = "sensitivity (%) at false positives per image, those of all images"
INTERVALS = "; 95 % intervals by bootstrap over "
TWO_MODELS = (
    "p is of these two trained models, not of methods: a study of several seeds compares those"
)
NO_LESIONS = "no lesions, hence no sensitivity: false positives per image of at least a score"


class Number(NamedTuple):
    """A number with, where they are known, its 95 % interval and p-value."""

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    sign: bool = False  # printed even if it is plus
    digits: int = 2
    least_p: float = 0.001  # a smaller p is printed as being below it

    @property
    def text(self) -> str:
        return "-" if self.value is None else self._format(self.value, self.digits)

    @property
    def ends(self) -> tuple[str, str] | None:
        """The ends of the interval, to one digit less than the number."""
        if self.low is None:
            return None
        return tuple(self._format(end, self.digits - 1) for end in (self.low, self.high))

    @property
    def p_text(self) -> str:
        """'p=0.012', and 'p<0.001' of what is less."""
        if self.p is None:
            return ""
        return f"p={self.p:.3f}" if self.p >= self.least_p else f"p<{self.least_p:g}"

    def _format(self, value: float, digits: int) -> str:
        text = f"{value:{'+' if self.sign else ''}.{digits}f}"
        return text[1:] if float(text) == 0 and text[0] in "+-" else text  # no -0.0


class Row(NamedTuple):
    """`labels` are the row's texts and counts; a new `section` is announced above the row."""

    labels: tuple[str | int, ...]
    numbers: tuple[Number, ...]
    section: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """`labels` and `measures` head the columns of the rows' labels and numbers.

    `name` is what the table is called in a file, `title` says what it holds.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    measures: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)


def all_tables(
    evaluations: Sequence[dict], comparisons: Sequence[dict] = (), published: bool = False
) -> list[Table]:
    """Every table of a results section.

    Args:
        evaluations: of `evaluate.evaluate`.
        comparisons: of `evaluate.compare`.
        published: with the tables of the papers, apart from one's own.
    """
    mains = [(e["name"], e["froc"]) for e in evaluations]
    title = f"All, thin (<= 2 mm) and thick slices: {OWN_IMAGES}"
    units = evaluations[0]["settings"]["resampled"]
    notes = {
        e["name"]: key_slices_note(e["key_slices"], e["table_key_slices"]) for e in evaluations
    }
    tables = [froc_table_of("slices", title, mains, units, notes)]
    tables += [comparison_table(c) for c in comparisons]
    if published:
        tables += published_tables()
    for title in dict.fromkeys(title for e in evaluations for title in e["breakdowns"]):
        rows = [(e["name"], e["breakdowns"].get(title, [])) for e in evaluations]
        of_lesions = any(title in e["by_lesion"] for e in evaluations)
        measure = ALL_IMAGES if of_lesions else OWN_IMAGES
        tables.append(froc_table_of(title, f"By {title}: {measure}", rows, units))
    tables.append(ap50_table(evaluations))
    if any(e["diameters"] for e in evaluations):
        tables.append(diameter_table(evaluations))
    return tables


def key_slices_note(key_slices: int, table_key_slices: int | None) -> str:
    """What a reader must know who compares: 'PARTIAL DATA: 120 of 4,817 key slices', or nothing."""
    if not table_key_slices or key_slices >= table_key_slices:
        return ""
    return f"PARTIAL DATA: {key_slices:,} of {table_key_slices:,} key slices"


def partial_data(results: Iterable[Result]) -> str:
    """What is said above all tables of results on a part of the key slices, a line; or nothing."""
    notes = [key_slices_note(len(r.records), r.table_key_slices) for r in results]
    said = "; ".join(filter(None, dict.fromkeys(notes)))
    return f"{said}. This does not compare with published results." if said else ""


def froc_table_of(
    name: str,
    title: str,
    results: Sequence[tuple[str, Sequence[dict]]],
    units: str = "patients",
    notes: Mapping[str, str] | None = None,
) -> Table:
    """Rows of `evaluate.table`, of one or several models; one without a name has no column.

    Args:
        name, title: of the table.
        results: of each model its name and its rows.
        units: what the bootstrap drew.
        notes: model -> what is said beside its first row.
    """
    named = any(model for model, _ in results)
    model, _, *counted = TABLES["slices"]
    labels = (*([model] if named else []), name, *counted)
    lesions = any(row["lesions"] for _, groups in results for row in groups)
    scores = [s for _, groups in results for row in groups for s in row.get("false_positives", ())]
    rows = []
    for model, groups in results:
        for i, row in enumerate(groups):
            ends = row.get("interval", {})
            numbers = [Number(row["sensitivity"][p], *ends.get(p, ())) for p in POINTS]
            numbers.append(Number(row["average"], *ends.get("average", ())))
            difference = Number(row["difference"], *ends.get("difference", ()), sign=True)
            numbers.append(Number(None) if row["group"] == "all" else difference)
            if not lesions:
                numbers = [Number(n) for n in row["false_positives"].values()]
            counts = (row["group"], row["images"], row["lesions"])
            note = (notes or {}).get(model, "") if i == 0 else ""
            rows.append(Row((*([model] if named else []), *counts), tuple(numbers), note=note))
    if rows and not lesions:
        measures = tuple(f"score {score}" for score in dict.fromkeys(scores))
        return Table(f"{name}, false positives", f"{name}: {NO_LESIONS}", labels, measures, rows)
    intervals = any("interval" in row for _, groups in results for row in groups)
    title += INTERVALS + units if intervals else ""
    return Table(name, title, labels, (*POINTS, AVERAGE, "diff."), rows)


def format_table(rows: Sequence[dict], note: str = "") -> str:
    """The rows of `evaluate.froc_table` as text, laid out as Table 3 of the AlignShift paper.

    note: of `key_slices_note`.
    """
    title = "Sensitivity (%) at false positives per image"
    return to_text(froc_table_of("slices", title, [("", rows)], notes={"": note}))


def comparison_table(comparison: dict) -> Table:
    """The paired difference of two results."""
    keys = (*POINTS, "average")
    rows = [
        Row((row["group"],), tuple(Number(*row[key], sign=True) for key in keys))
        for row in comparison["rows"]
    ]
    name = f"{comparison['second']} minus {comparison['first']}"
    title = (
        f"{name}: paired difference in points of %{INTERVALS}{comparison['resampled']}, two-sided p"
        f"; {TWO_MODELS}"
    )
    return Table(name, title, ("slices",), (*POINTS, AVERAGE), rows)


def ap50_table(evaluations: Sequence[dict]) -> Table:
    """AP50 of boxes and masks."""
    rows = [
        Row((e["name"],), (Number(e["ap50"]["bbox"]), Number(e["ap50"]["segm"])))
        for e in evaluations
    ]
    title = "AP50 (%), COCO's definition by pycocotools"
    return Table("AP50", title, TABLES["AP50"], ("boxes", "masks"), rows)


def diameter_table(evaluations: Sequence[dict]) -> Table:
    """Errors of the diameters that predicted masks have."""
    rows = []
    for e in evaluations:
        for axis in ("long", "short") if e["diameters"] else ():
            errors = e["diameters"][axis]
            numbers = (
                Number(errors["mean"], *errors["interval"], sign=True),
                Number(errors["median"], sign=True),
                Number(errors["mean_absolute"]),
                *(Number(limit, sign=True) for limit in errors["limits"]),
            )
            rows.append(Row((e["name"], axis, e["diameters"]["n"]), numbers))
    return Table(
        "diameters",
        "Diameters of the masks of hit lesions, predicted minus annotated (mm), with the limits of "
        f"agreement{INTERVALS}{evaluations[0]['settings']['resampled']}",
        TABLES["diameters"],
        ("mean", "median", "mean absolute", "lower limit", "upper limit"),
        rows,
    )


def published_tables() -> list[Table]:
    """What papers report; a section of a table for each set of sources."""
    tables = []
    for thickness, last in ((("all",), "AP50"), (("thin", "thick"), "diff.")):
        table = Table(
            f"published, {' and '.join(thickness)} slices",
            "PUBLISHED, as printed in the papers, not evaluated here: sensitivity (%) at false "
            f"positives per image, {' and '.join(thickness)} slices",
            TABLES["published"],
            (*POINTS, AVERAGE, last),
        )
        for row in PUBLISHED:
            if row.thickness not in thickness:
                continue
            values = (*row.sensitivity, row.average, row.ap50 if last == "AP50" else row.difference)
            numbers = tuple(
                Number(value, sign=measure == "diff.", digits=row.decimals)
                for value, measure in zip(values, table.measures)
            )
            section = f"{'; '.join(row.sources)}. Trained on: {row.trained_on}"
            labels = (row.method, row.slices or "-", row.thickness)
            table.rows.append(Row(labels, numbers, section, row.note))
        tables.append(table)
    return tables


def to_text(table: Table) -> str:
    """For a terminal: columns lined up, intervals beneath their numbers, p-values beneath these."""
    lines: list[str | list[str]] = []  # the text of a section, or the cells of a line
    for row, section in _with_sections(table):
        lines += [f"-- {section}"] if section else []
        lines.append([*map(str, row.labels), *(n.text for n in row.numbers), row.note])
        for beneath in (
            ["..".join(n.ends) if n.ends else "" for n in row.numbers],
            [n.p_text for n in row.numbers],
        ):
            lines += [[*[""] * len(row.labels), *beneath, ""]] if any(beneath) else []
    header = [*table.labels, *table.measures, ""]
    columns = zip(header, *(line for line in lines if isinstance(line, list)))
    widths = [max(map(len, column)) for column in columns]
    widths[len(table.labels) : -1] = [max(w, len("100.00")) for w in widths[len(table.labels) : -1]]
    left = _left_aligned(table)
    bars = {len(table.labels) - 1, *(i - 1 for i, name in enumerate(header) if name == AVERAGE)}

    def laid_out(line: list[str]) -> str:
        cells = [
            (f"{cell:<{width + 1}}" if i in left else f"{cell:>{width}}") + " |" * (i in bars)
            for i, (cell, width) in enumerate(zip(line[:-1], widths))
        ]
        return " ".join([*cells, "", line[-1]]).rstrip()

    head = laid_out(header)
    body = [line if isinstance(line, str) else laid_out(line) for line in lines]
    return "\n".join([table.title, head, "-" * len(head), *body])


def to_markdown(table: Table) -> str:
    """A table as GitHub draws it, under its title."""

    def number(n: Number) -> str:
        interval = f" [{', '.join(n.ends)}]" if n.ends else ""
        return n.text + interval + (f", {_escape_markdown(n.p_text)}" if n.p is not None else "")

    header, lines = _grid(table, _escape_markdown, number)
    left = _left_aligned(table)
    rule = ["---" if i in left else "---:" for i in range(len(header))]
    blank = [""] * (len(header) - 1)
    rows = [[f"*{line}*", *blank] if isinstance(line, str) else line for line in lines]
    table_lines = [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]
    return "\n".join([f"**{_escape_markdown(table.title)}**", "", *table_lines])


def to_latex(table: Table) -> str:
    """A `tabular` with the rules of booktabs; each of its rows can be pasted into another one."""

    def number(n: Number) -> str:
        interval = rf" {{\scriptsize $[{', '.join(n.ends)}]$}}" if n.ends else ""
        p = f", ${n.p_text}$" if n.p is not None else ""
        return (f"${n.text}$" if n.value is not None else "--") + interval + p

    header, lines = _grid(table, _escape_latex, number)
    left = _left_aligned(table)
    rows = [
        rf"\multicolumn{{{len(header)}}}{{l}}{{\emph{{{line}}}}} \\"
        if isinstance(line, str)
        # A [ or * at the beginning would be taken for an option of the line before.
        else "{}" * line[0].startswith(("[", "*")) + " & ".join(line) + r" \\"
        for line in lines
    ]
    columns = "".join("l" if i in left else "r" for i in range(len(header)))
    return "\n".join(
        [
            f"% {table.title}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def to_csv(tables: Sequence[Table]) -> str:
    """All tables as one, a line a number: what statistics programs like to read."""
    labels = list(dict.fromkeys(label for table in tables for label in table.labels))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    table_column, *columns = NUMBER_COLUMNS
    writer.writerow([table_column, *labels, *columns])
    for table in tables:
        for row in table.rows:
            own = dict(zip(table.labels, row.labels))
            for measure, n in zip(table.measures, row.numbers):
                if n.value is not None:
                    cells = [measure, n.value, n.low, n.high, n.p, row.section, row.note]
                    writer.writerow([table.name, *(own.get(x) for x in labels), *cells])
    return file.getvalue()


def _with_sections(table: Table) -> Iterator[tuple[Row, str]]:
    """The rows, each with its section where a new one begins and '' elsewhere."""
    last = ""
    for row in table.rows:
        yield row, row.section if row.section != last else ""
        last = row.section


def _left_aligned(table: Table) -> set[int]:
    """The columns of texts: the last one, of notes, and labels that are not numbers."""
    texts = {
        i
        for i in range(len(table.labels))
        if not all(isinstance(row.labels[i], int) for row in table.rows)
    }
    return texts | {len(table.labels) + len(table.measures)}


def _grid(
    table: Table, escape: Callable[[str], str], number: Callable[[Number], str]
) -> tuple[list[str], list[str | list[str]]]:
    """Header and lines of a table, all escaped; a line is a list of cells, or a section's text."""
    noted = any(row.note for row in table.rows)
    lines: list[str | list[str]] = []
    for row, section in _with_sections(table):
        lines += [escape(section)] if section else []
        note = [escape(row.note)] if noted else []
        labels = (escape(str(label)) for label in row.labels)
        lines.append([*labels, *map(number, row.numbers), *note])
    header = [*table.labels, *table.measures, *(["note"] if noted else [])]
    return [escape(name) for name in header], lines


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
}


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def write_tables(tables: Sequence[Table], folder: Path, note: str = "") -> list[Path]:
    """Writes the tables to evaluation.csv, table.md and table.tex; returns the paths.

    note: see `as_files`.
    """
    names = {"csv": "evaluation.csv", "md": "table.md", "tex": "table.tex"}
    for kind, content in as_files(tables, note).items():
        write_whole(folder / names[kind], content)
    return [folder / name for name in names.values()]


def as_files(tables: Sequence[Table], note: str = "") -> dict[str, str]:
    """What files of all tables hold, by their endings: 'csv', 'md', 'tex'.

    note: a line above all tables, such as of `partial_data`; CSV has no place for one.
    """
    markdown = [_escape_markdown(note)] if note else []
    latex = [f"% {note}"] if note else []
    return {
        "csv": to_csv(tables),
        "md": "\n\n".join([*markdown, *map(to_markdown, tables)]) + "\n",
        "tex": "\n\n".join(["% needs \\usepackage{booktabs}", *latex, *map(to_latex, tables)])
        + "\n",
    }
