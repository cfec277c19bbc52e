"""FROCMetric: gathers detections across processes and scores them as the papers do."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from mmdet.registry import METRICS
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log

from deeplesion.conventions import PIXEL_CENTRE
from deeplesion.data.coco import encode_mask
from deeplesion.evaluation.evaluate import froc_table
from deeplesion.evaluation.results import (
    Result,
    other_weights,
    table_file,
    write_results,
    write_table,
)
from deeplesion.report.tables import format_table, key_slices_note


@METRICS.register_module()
class FROCMetric(BaseMetric):
    """Sensitivity at 0.5, 1, 2, 4, 8, 16 false positives an image, thin and thick slices apart.

    Logs the table of the papers and returns its main numbers in percent: `FROC/average` (the mean
    at 0.5, 1, 2, 4, by which a model is chosen), `FROC/S@0.5` ..., `FROC/thin_average`,
    `FROC/thick_average`. Of images without a lesion these are NaN, and the false positives per
    image of at least some scores are told instead. Results are written before they are scored.

    Args:
        iou_threshold, pixel_offset: of a hit, see `deeplesion.evaluation.froc.froc`.
        result_file: where to write detections and ground truth (see `results.write_results`), or
            None; the table goes beside it, as `results.table_file` names it. Masks of the
            detections are kept only when it is given.
        views: of test-time augmentation, with which result and table are marked.
        model: what is tested, see `results.Result`; they say so. If there is a result of other
            weights that they will replace, there is a warning.
    """

    default_prefix = "FROC"

    def __init__(
        self,
        iou_threshold: float = 0.5,
        pixel_offset: int = 1,
        result_file: str | None = None,
        # Through the processes' own connection, on the CPU too. mmengine's 'cpu' goes through files
        # in the current folder, which it leaves behind and which nodes need not share.
        collect_device: str = "gpu",
        prefix: str | None = None,
        views: Sequence[str] = (),
        model: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.iou_threshold = iou_threshold
        self.pixel_offset = pixel_offset
        self.result_file = result_file
        self.views = tuple(views)
        self.model = model
        if result_file and model and (before := other_weights(Path(result_file), model)):
            replaces = f"{result_file}: replaces the result of {before}"
            print_log(replaces, logger="current", level=logging.WARNING)

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Keeps one record an image; boxes become pixel-centre coordinates of the image's file."""
        for sample in data_samples:
            found = sample["pred_instances"]
            boxes = found["bboxes"].double().cpu().numpy() - PIXEL_CENTRE
            record = dict(
                file_name=sample["file_name"],
                patient=sample["patient"],
                study=sample["study"],
                series=sample["series"],
                slice_range=list(sample["slice_range"]) if sample["slice_range"] else None,
                height=sample["ori_shape"][0],
                width=sample["ori_shape"][1],
                spacing_mm=sample["spacing_mm"],
                thickness_mm=sample["file_thickness_mm"],
                lesions=sample["lesions"],
                boxes=np.round(boxes, 3).tolist(),
                scores=found["scores"].float().tolist(),  # in full: rounded, some would be ties
            )
            if self.result_file is not None and "masks" in found:
                record["masks"] = [encode_mask(mask.cpu().numpy()) for mask in found["masks"]]
            self.results.append(record)

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        expected = (self.dataset_meta or {}).get("table_key_slices")
        rule = (self.iou_threshold, self.pixel_offset)
        result = Result("", results, *rule, expected, self.views, self.model)
        if self.result_file is not None:  # first: whatever happens next, the work is not lost
            write_results(Path(self.result_file), results, expected, self.views, self.model)
        rows = froc_table(results, *rule)
        note = key_slices_note(len(results), expected)
        print_log("\n" + format_table(rows, note), logger="current")
        if self.result_file is not None:
            write_table(table_file(Path(self.result_file)), rows, result)
        metrics = {f"S@{point}": value for point, value in rows[0]["sensitivity"].items()}
        metrics["average"] = rows[0]["average"]
        metrics.update({f"{row['group']}_average": row["average"] for row in rows[1:]})
        metrics = {name: math.nan if value is None else value for name, value in metrics.items()}
        for score, value in rows[0].get("false_positives", {}).items():
            metrics[f"false_positives_of_score_{score}"] = value
        return metrics
