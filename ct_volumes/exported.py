"""ExportedDetector: a detector that tools/export.py wrote, over CT volumes, without MMDetection.

Its networks are programs; what lies between them is NumPy (`two_stage`, `roi_align`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from ct_volumes import onnx_program, two_stage
from ct_volumes.export_format import MULTIPLE, PROGRAMS, program_path, read_manifest
from ct_volumes.lesions import Algorithm, SliceDetections
from ct_volumes.onnx_program import Program
from ct_volumes.roi_align import roi_align
from ct_volumes.slice_detector import Look, SliceDetector, on_slice, threshold_for
from ct_volumes.stacks import plan_volume_stack
from ct_volumes.volume import CTVolume
from deeplesion.data.warp import resizing, warp
from deeplesion.errors import DataError

INTERPOLATIONS = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC}


class ExportedDetector(SliceDetector):
    """A detector of a folder that tools/export.py wrote.

    It finds what `mmdet_ext.engine.predict.LesionDetector` does with the same config and
    checkpoint, to rounding.

    Args:
        folder: with `manifest.json` and the programs.
        open_program: opens the file of a program; the default is for ONNX, that of torch-export is
            `mmdet_ext.engine.torch_program.open_program`.
        manifest: what `read_manifest` returns of the folder, which is read by default.

    Raises:
        MissingDataError, DataError: as `read_manifest` and `program_path` do; a program of a kind
            that `open_program` does not open.
    """

    batch_size = 4

    def __init__(
        self,
        folder: str | Path,
        open_program: Callable[[Path], Program] = onnx_program.open_program,
        manifest: Mapping | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder) if manifest is None else manifest
        self.name = self.manifest["experiment"]
        self.checkpoint_sha256 = self.manifest["checkpoint_sha256"]
        self.network_sha256 = self.manifest["network_sha256"]
        self.software = self.manifest["software"]
        self.with_masks = self.manifest.get("masks") is not None
        self.stack = dict(self.manifest["stack"])
        self.input = self.manifest["input"]
        self.size = tuple(self.input["size"]) if self.input["size"] else None
        self.programs = {
            name: open_program(program_path(self.folder, self.manifest, name))
            for name in PROGRAMS
            if name in self.manifest["programs"]
        }

    def algorithm(self, options: dict) -> Algorithm:
        return super().algorithm({**options, "exported": self.manifest["kind"]})

    def key(self, *args, **kwargs) -> dict:
        programs = [entry["sha256"] for entry in self.manifest["programs"].values()]
        return {**super().key(*args, **kwargs), "exported": programs}

    @contextlib.contextmanager
    def looking(self, volume: CTVolume, amp: bool, least_score: float) -> Iterator[Look]:
        score_thr = threshold_for(self.manifest["boxes"]["score_thr"], least_score)
        yield lambda keys: self._detect_batch(volume, keys, score_thr)

    def _detect_batch(
        self, volume: CTVolume, keys: Sequence[int], score_thr: float
    ) -> list[SliceDetections]:
        plans = [plan_volume_stack(volume.positions_mm, key, **self.stack) for key in keys]
        places = list(dict.fromkeys(place for plan, _ in plans for place in plan))
        slices, shape = self.slices(volume, places)
        found = []
        for key, (plan, thickness_mm) in zip(keys, plans):
            stack = slices[[places.index(place) for place in plan]]
            found.append(self._detect(volume, key, stack, shape, thickness_mm, score_thr))
        return found

    def slices(
        self, volume: CTVolume, places: Sequence[tuple[int, int, float]]
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """(S, H, W) int16 slices at the network's size and padded to a multiple of 32, and the size
        without the padding.

        Raises DataError for a size that the program does not take.
        """
        image = self.with_air(volume, places)
        shape = self.size or image.shape[:2]
        if self.size:
            matrix = resizing(image.shape[:2], shape)
            how = INTERPOLATIONS[self.input["interpolation"]]
            parts = [
                warp(np.ascontiguousarray(image[..., n : n + 1]), matrix, shape, how)
                for n in range(len(places))
            ]
            image = np.concatenate(parts, axis=2)
        beyond = [(0, -side % MULTIPLE) for side in shape]
        padded = np.pad(
            image.transpose(2, 0, 1), [(0, 0), *beyond], constant_values=self.input["air_hu"]
        )
        if (only := self.input["program_size"]) and tuple(only) != padded.shape[1:]:
            raise DataError(
                f"{self.folder} takes images of {only[0]} x {only[1]} pixels alone, and those of"
                f" the scan are {padded.shape[1]} x {padded.shape[2]}: export the detector with"
                " --size of the scan's"
            )
        return padded, shape

    def _detect(
        self,
        volume: CTVolume,
        key: int,
        stack: np.ndarray,
        shape: tuple[int, int],
        thickness_mm: float,
        score_thr: float,
    ) -> SliceDetections:
        """What is found on the slice in the middle of a (D, H, W) stack."""
        features, boxes, scores, labels = self.boxes(stack, shape, thickness_mm, score_thr)
        field = self.field(volume)
        scale = np.float32([shape[1] / field[1], shape[0] / field[0]] * 2)
        of_field = boxes / scale if self.with_masks else boxes * (1 / scale)
        shrink = np.float32(self.manifest["boxes"]["shrink"])
        there, on = on_slice(shrunk(of_field, shrink / scale[:2]), volume.hu.shape[1:])
        masks = None
        if self.with_masks:
            masks = self._masks(
                features, boxes[there], labels[there], of_field[there], field, volume.hu.shape[1:]
            )
        return SliceDetections(key, on, scores[there], masks)

    def boxes(
        self, stack: np.ndarray, shape: tuple[int, int], thickness_mm: float, score_thr: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The (h, w, C) features of a stack, and what is found by them: (n, 4) boxes in its pixels'
        edges, (n,) scores and (n,) classes."""
        if not thickness_mm > 0:
            raise DataError(f"the slices' thickness must be > 0 mm, got {thickness_mm}")
        thickness = np.float32([thickness_mm])
        features, logits, deltas = self.programs["features"](stack[None, None], thickness)
        regions = two_stage.proposals(logits[0], deltas[0], shape, self.manifest["proposals"])
        options = self.manifest["boxes"]
        if not len(regions):
            nothing = np.zeros(0, np.float32)
            return features[0], regions, nothing, nothing.astype(int)
        pooled = self._pooled(features[0], regions, options)
        head = self.programs["boxes"](pooled)
        found = two_stage.best_boxes(regions, *head, shape, options, score_thr)
        return features[0], *found

    def _masks(
        self,
        features: np.ndarray,
        boxes: np.ndarray,
        labels: np.ndarray,
        of_field: np.ndarray,
        field: tuple[int, int],
        shape: tuple[int, int],
    ) -> tuple:
        """A `Patch` for each of (n, 4) boxes, which are `of_field` in pixels of the scan."""
        options = self.manifest["masks"]
        if not len(boxes):
            return ()
        (logits,) = self.programs["masks"](self._pooled(features, boxes, options))
        logits = logits[np.arange(len(boxes)), labels if options["per_class"] else 0]
        if options["whole_pixels"]:
            of_field = np.floor(of_field)
        return tuple(
            two_stage.pasted(mask, box, field, shape, options["threshold"])
            for mask, box in zip(two_stage.sigmoid(logits), of_field)
        )

    def _pooled(self, features: np.ndarray, boxes: np.ndarray, options: Mapping) -> np.ndarray:
        how = (options[name] for name in ("bins", "scale", "sampling_ratio", "aligned"))
        return roi_align(features, boxes, *how)


def shrunk(boxes: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """(n, 4) boxes smaller by `margin`, (x, y), on every side; what would become less than nothing
    becomes its centre."""
    if not margin.any():
        return boxes
    first, last = boxes[:, :2], boxes[:, 2:]
    centre, half = (first + last) / 2, np.maximum((last - first) / 2 - margin, 0)
    return np.concatenate([centre - half, centre + half], axis=1)
