"""Lesions of the phantom that nobody has labelled: in DeepLesion about half of the training set's.

They are in the images and in the truth, and not in the table of lesions. Validation and test keep
all of theirs, so that what is measured there is measured against everything there is.
"""

from __future__ import annotations

import numpy as np

from deeplesion.conventions import DL_INFO_COLUMNS, SPLITS

_NOISY = list(DL_INFO_COLUMNS).index("Possibly_noisy")
_SPLIT = list(DL_INFO_COLUMNS).index("Train_Val_Test")


def hide(records: list[dict], share: float, seed: int) -> list[dict]:
    """The records of all series (`make.make_series`) without the rows of lesions that are hidden.

    Of the clean lesions of the training split `share` is drawn, each by itself: rounded, and at
    least one of them stays. A key slice whose lesions are all hidden has no row left, one with
    others stays. In the truth every lesion gets `labelled`, whether its row is in the table.

    The draw has a generator of its own, so nothing else of the phantom depends on it.
    """
    pairs = [list(zip(record["rows"], _lesions(record), strict=True)) for record in records]
    clean = [
        lesion
        for found in pairs
        for row, lesion in found
        if SPLITS[int(row[_SPLIT])] == "train" and not int(row[_NOISY])
    ]
    # No patient is number 0, and none of their generators' seeds begins as this one.
    order = np.random.default_rng([seed, 0, 1]).permutation(len(clean))
    chosen = {id(clean[i]) for i in order[: min(round(share * len(clean)), len(clean) - 1)]}
    for found in pairs:
        for _, lesion in found:
            lesion["labelled"] = id(lesion) not in chosen
    return [
        {**record, "rows": [row for row, lesion in found if lesion["labelled"]]}
        for record, found in zip(records, pairs, strict=True)
    ]


def _lesions(record: dict) -> list[dict]:
    """The truth on a series' lesions in the order of its rows."""
    return [lesion for entry in record["truth"].values() for lesion in entry["lesions"]]
