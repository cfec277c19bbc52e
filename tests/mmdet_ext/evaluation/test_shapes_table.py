"""The table of the proof of concept, by hand."""

from mmdet_ext.evaluation.shapes_table import PUBLISHED, format_orders, format_table

SCORES = ("paper_dice", "paper_iou", "code_dice", "code_iou", "dice", "iou")


def row(mauc, first):
    return {"mauc": mauc, **{name: first + i for i, name in enumerate(SCORES)}}


RESULTS = {
    "0": {"2D": {"dice": 99.0}, "ACS p.": row(88.0, 90.0), "ACS r.": row(70.0, 91.0)},
    "1": {"ACS p.": row(84.0, 94.0), "ACS r.": {"mauc": 85.0}},
}


def line(text, start):
    (found,) = [line for line in text.splitlines() if line.startswith(start)]
    return found[len(start) :].split()


def test_rows_are_means_over_seeds_beside_the_papers():
    table = format_table(RESULTS)
    mean = "86.0 ± 2.8 92.0 ± 2.8 93.0 ± 2.8 94.0 ± 2.8 95.0 ± 2.8 96.0 ± 2.8 97.0 ± 2.8"
    assert line(table, "ACS p.") == [*mean.split(), "88.1", "95.4", "92.0"]
    single = "77.5 ± 10.6 91.0 92.0 93.0 94.0 95.0 96.0"
    assert line(table, "ACS r.") == [*single.split(), "68.7", "94.7", "90.7"]
    assert line(table, "3D r.") == [*"-------", "72.1", "94.6", "90.8"]
    assert all(f"\n{name}" in table for name in PUBLISHED)
    widths = {len(text) for text in table.splitlines()[2:7]}
    assert len(widths) == 1


def test_orders_are_counted_in_the_seeds_that_have_both():
    orders = format_orders(RESULTS)
    assert "mAUC: ACS p. above ACS r.: holds in 1 of 2 seeds, +8.5 ± 13.4 points" in orders
    assert "Dice: ACS p. above ACS r.: holds in 0 of 1 seeds, -1.0 points" in orders
    assert "Dice: ACS p. above 3D r.: not run" in orders
