"""The DeepLesion results of four papers, as they print them: for reading beside one's own.

All are of the official test split. Every row says which tables it stands in and what the model was
trained on; what does not fit between the papers is told in its note. Averages and differences fit
the printed sensitivities within rounding, in every row.
"""

from __future__ import annotations

from typing import NamedTuple

ALIGNSHIFT = "AlignShift (Yang et al., MICCAI 2020)"
A3D = "A3D (Yang et al., MICCAI 2021)"
ACS = "ACS (Yang et al., IEEE JBHI 2021)"
VA = "Volumetric Attention (Wang et al., MICCAI 2019)"


class Published(NamedTuple):
    """One row of a published table; sensitivities and averages in %, None where it has a dash.

    Attributes:
        method: name of the method, as a rule that of the table.
        slices: how many slices it sees; None where the table does not say.
        thickness: 'all', 'thin' (<= 2 mm) or 'thick' (> 2 mm) slices.
        sensitivity: at 0.5, 1, 2, 4, 8, 16 false positives per image.
        average: "Avg.[0.5,1,2,4]" as printed.
        sources: the tables it stands in.
        trained_on: the training data, as far as the papers here say.
        difference: "diff." as printed: from the average over all slices, in points of %.
        ap50: AP at an IoU of 0.5.
        note: what to know before quoting it.
        decimals: how many are printed.
    """

    method: str
    slices: int | None
    thickness: str
    sensitivity: tuple[float | None, ...]
    average: float | None
    sources: tuple[str, ...]
    trained_on: str
    difference: float | None = None
    ap50: float | None = None
    note: str = ""
    decimals: int = 2


def _rows(trained_on: str, *sources: str, rows: tuple) -> tuple[Published, ...]:
    """Rows of method, slices, thickness, six sensitivities, average[, difference][, note]."""
    published = []
    for method, slices, thickness, *values in rows:
        note = values.pop() if isinstance(values[-1], str) else ""
        sensitivity, (average, *difference) = tuple(values[:6]), values[6:]
        published.append(
            Published(
                method, slices, thickness, sensitivity, average, sources, trained_on,
                *difference, note=note,
            )
        )  # fmt: skip
    return tuple(published)


def _attention_rows(trained_on: str, *sources: str, rows: tuple) -> tuple[Published, ...]:
    """Rows of method, slices, sensitivities at 0.5, 1 and 2, and AP50."""
    return tuple(
        Published(
            method,
            slices,
            "all",
            (*three, None, None, None),
            None,
            sources,
            trained_on,
            ap50=ap50,
            decimals=1,
        )
        for method, slices, *three, ap50 in rows
    )


_TRAIN = "training split"
_TRAIN_VAL = "training and validation split"
_UNSAID = "not said there"
_TAGS = "trained with 171 tags from reports besides"
_QUOTED = (f"{ALIGNSHIFT}, Table 2", f"{A3D}, Table 3", f"{ACS}, Table VII")
_ = None

# fmt: off
PUBLISHED: tuple[Published, ...] = (
    # What these papers quote of others
    *_rows(_UNSAID, *_QUOTED, rows=(
        ("3DCE", 27, "all", 62.48, 73.37, 80.70, 85.65, 89.09, 91.06, 75.55),
        ("ULDor", 1, "all", 52.86, 64.80, 74.84, 84.38, 87.17, 91.80, 69.22),
        ("Improved RetinaNet", 3, "all", 72.15, 80.07, 86.40, 90.77, 94.09, 96.32, 82.35),
        ("MVP-Net", 3, "all", 70.01, 78.77, 84.71, 89.03, _, _, 80.63),
        ("MVP-Net", 9, "all", 73.83, 81.82, 87.60, 91.30, _, _, 83.64),
        ("MULAN", 9, "all", 76.12, 83.69, 88.76, 92.30, 94.71, 95.64, 85.22, _TAGS),
    )),
    *_rows(_UNSAID, _QUOTED[0], _QUOTED[2], rows=(
        ("MULAN without score refinement", 9, "all", _, _, _, _, _, _, 84.22, _TAGS),
    )),
    *_rows(_UNSAID, f"{A3D}, Table 3", rows=(
        ("Bounding Maps", 3, "all", 73.32, 81.24, 86.75, 90.71, _, _, 83.01),
        ("MP3D", 9, "all", 79.60, 85.29, 89.61, 92.45, _, _, 86.74),
    )),
    *_rows(_TRAIN_VAL, *_QUOTED, rows=(
        ("Volumetric Attention", 3, "all", 69.10, 77.90, 83.80, _, _, _, _,
         "9 slices by its own paper"),
    )),

    # AlignShift; of thin and thick slices too
    *_rows(_TRAIN, f"{ALIGNSHIFT}, Tables 2 and 3", rows=(
        ("2.5D", 3, "all", 71.27, 79.82, 86.30, 90.61, 93.75, 95.70, 82.00),
        ("2.5D", 7, "all", 72.66, 81.45, 87.07, 90.98, 93.40, 95.30, 83.04),
    )),
    *_rows(_TRAIN, f"{ALIGNSHIFT}, Tables 2 and 3", f"{A3D}, Table 2", rows=(
        ("TSM", 3, "all", 71.80, 80.11, 86.97, 91.10, 93.75, 95.56, 82.50),
        ("TSM", 7, "all", 75.98, 83.65, 88.44, 92.14, 94.89, 96.50, 85.05),
    )),
    *_rows(_TRAIN, f"{ALIGNSHIFT}, Tables 2 and 3", f"{A3D}, Tables 2 and 3", rows=(
        ("AlignShift", 3, "all", 73.00, 81.17, 87.05, 91.78, 94.63, 95.48, 83.25),
        ("AlignShift", 7, "all", 78.68, 85.69, 90.37, 93.49, 95.48, 97.05, 87.06),
    )),
    *_rows(_TRAIN, f"{ALIGNSHIFT}, Table 3", rows=(
        ("2.5D", 3, "thin", 72.78, 80.65, 87.21, 90.94, 93.97, 95.86, 82.89, +0.89),
        ("2.5D", 3, "thick", 69.88, 79.16, 85.51, 90.48, 93.65, 95.65, 81.26, -0.74),
        ("2.5D", 7, "thin", 75.77, 83.93, 88.85, 92.37, 94.26, 95.78, 85.23, +2.19),
        ("2.5D", 7, "thick", 69.76, 78.96, 85.75, 90.03, 92.67, 94.99, 81.13, -1.91),
        ("TSM", 3, "thin", 74.19, 81.75, 88.11, 92.17, 94.42, 96.15, 84.06, +1.56),
        ("TSM", 3, "thick", 69.72, 78.55, 86.08, 90.27, 93.08, 94.91, 81.16, -1.34),
        ("TSM", 7, "thin", 78.76, 85.53, 89.67, 93.48, 95.61, 96.68, 86.86, +1.81),
        ("TSM", 7, "thick", 73.26, 81.97, 87.10, 90.96, 94.14, 96.42, 83.32, -1.73),
        ("AlignShift", 3, "thin", 73.43, 81.26, 87.08, 91.92, 94.87, 95.65, 83.43, +0.18),
        ("AlignShift", 3, "thick", 72.85, 81.20, 87.14, 91.78, 94.38, 95.28, 83.24, -0.01),
        ("AlignShift", 7, "thin", 79.64, 86.55, 90.73, 94.18, 95.82, 97.17, 87.78, +0.72),
        ("AlignShift", 7, "thick", 78.06, 85.10, 89.99, 92.76, 95.08, 96.91, 86.48, -0.58),
    )),

    # A3D
    *_rows(_TRAIN, f"{A3D}, Table 2", rows=(
        ("no fusion", 3, "all", 72.57, 79.89, 86.80, 91.04, 94.24, 96.32, 82.58),
        ("no fusion", 7, "all", 73.66, 82.15, 87.72, 91.38, 93.86, 95.98, 83.73),
        ("I3D", 3, "all", 72.01, 80.09, 86.54, 91.29, 93.91, 95.68, 82.48),
        ("I3D", 7, "all", 75.37, 83.43, 88.68, 92.20, 94.52, 96.07, 84.92),
        ("P3D", 3, "all", 62.13, 73.21, 82.14, 88.60, 92.37, 94.95, 76.52),
        ("P3D", 7, "all", 74.84, 82.17, 87.57, 91.72, 94.90, 96.23, 84.07),
    )),
    *_rows(_TRAIN, f"{A3D}, Tables 2 and 3", rows=(
        ("ACS", 3, "all", 72.82, 81.15, 87.40, 91.35, 94.69, 96.42, 83.18,
         "the ACS paper has other numbers"),
        ("ACS", 7, "all", 78.38, 85.39, 90.07, 93.19, 95.18, 96.75, 86.76),
        ("A3D", 3, "all", 74.10, 81.81, 87.87, 92.13, 94.60, 96.50, 83.98),
        ("A3D", 7, "all", 80.27, 86.73, 91.33, 94.12, 96.15, 97.33, 88.11),
    )),

    # ACS; started at random or from 2D weights
    *_rows(_TRAIN, f"{ACS}, Table VII", rows=(
        ("2.5D, random start", 3, "all", 70.34, 79.11, 86.16, 90.94, 94.04, 96.01, 81.64),
        ("2.5D, pretrained", 3, "all", 72.57, 79.89, 86.80, 91.04, 94.24, 96.32, 82.58,
         "the numbers of 'no fusion' in A3D"),
        ("3D, random start", 3, "all", 63.58, 74.63, 82.88, 88.03, 91.39, 93.99, 77.28),
        ("3D, pretrained (I3D)", 3, "all", 72.01, 80.09, 86.54, 91.29, 93.91, 95.68, 82.48),
        ("ACS, random start", 3, "all", 72.52, 80.85, 87.10, 91.05, 94.39, 96.12, 82.88),
        ("ACS, pretrained", 3, "all", 73.00, 81.17, 87.05, 91.78, 94.63, 95.48, 83.25,
         "the numbers of AlignShift; A3D quotes ACS with others"),
        ("2.5D, random start", 7, "all", 73.37, 81.13, 86.73, 90.96, 93.99, 95.79, 83.05),
        ("2.5D, pretrained", 7, "all", 73.66, 82.15, 87.72, 91.38, 93.86, 95.98, 83.73,
         "the numbers of 'no fusion' in A3D"),
        ("3D, random start", 7, "all", 64.10, 75.14, 82.13, 87.44, 91.53, 94.22, 77.20),
        ("3D, pretrained (I3D)", 7, "all", 75.37, 83.43, 88.68, 92.20, 94.52, 96.07, 84.92),
        ("ACS, random start", 7, "all", 78.01, 84.75, 88.97, 91.76, 93.79, 95.26, 85.87),
        ("ACS, pretrained", 7, "all", 78.38, 85.39, 90.07, 93.19, 95.18, 96.75, 86.76),
    )),

    # Volumetric Attention, one decimal; the first six are of the literature
    *_attention_rows(_UNSAID, f"{VA}, Table 3", rows=(
        ("Faster R-CNN, VGG-16", _, 56.9, 67.3, 75.6, _),
        ("R-FCN, VGG-16", _, 55.7, 67.3, 75.4, _),
        ("Improved R-FCN, VGG-16", _, 56.5, 67.7, 76.9, _),
        ("Data-level fusion, VGG-16", 11, 58.5, 70.0, 77.9, _),
        ("3DCE, VGG-16", 9, 59.3, 70.7, 79.1, _),
        ("3DCE, VGG-16", 27, 62.5, 73.4, 80.7, _),
    )),
    *_attention_rows(_TRAIN_VAL, f"{VA}, Table 4", rows=(
        ("Faster R-CNN, ResNet-152", 3, _, 77.4, _, 64.9),
        ("Faster R-CNN, ResNet-101", 3, _, 75.1, _, 61.8),
        ("Faster R-CNN, ResNet-50", 3, _, 73.4, _, 60.0),
        ("Deformable Faster R-CNN, ResNet-50", 3, _, 76.3, _, 62.4),
        ("Deformable Faster R-CNN + VCA", 9, _, 76.8, _, 63.8),
        ("Deformable Faster R-CNN + VSA", 9, _, 76.9, _, 64.1),
    )),
    *_attention_rows(_TRAIN_VAL, f"{VA}, Tables 3 and 4", rows=(
        ("Faster R-CNN + VA", 9, 67.6, 75.6, 82.5, 63.0),
        ("Deformable Faster R-CNN + VA", 9, 69.1, 77.9, 83.8, 65.0),
    )),
)
# fmt: on
