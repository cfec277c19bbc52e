"""The training pipeline between an annotation and the network: load slices, augment, pack.

Coordinates inside the pipeline count pixel edges, as mmdet's do: pixel (0, 0) spans [0, 1) and its
centre is at 0.5. Files count pixel centres; `deeplesion.py` and `froc_metric.py`
convert, nothing here.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet.datasets.transforms import PackDetInputs
from mmdet.registry import TRANSFORMS
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks

from deeplesion.conventions import RECIST_MARGIN
from deeplesion.data.slice_cache import CachedSliceFolder
from deeplesion.data.slices import SliceFolder, load_slices
from deeplesion.data.warp import resizing, warp
from deeplesion.errors import DataError


@TRANSFORMS.register_module()
class LoadCTSlices(BaseTransform):
    """Reads the slices around a key slice: `img` becomes (H, W, D) int16 HU.

    Which slices, the sample says: its `stack` is the data set's (see `DeepLesionDataset`).
    """

    def transform(self, results: dict) -> dict:
        """Adds `img`, `img_shape`, `ori_shape` and the stack's `thickness_mm`, maybe infinite."""
        prefix, cache = results["img_prefix"], results.get("cache_prefix")
        folder = CachedSliceFolder(prefix, cache) if cache else SliceFolder(prefix)
        slices, thickness_mm = load_slices(
            folder,
            results["file_name"],
            results["file_thickness_mm"],
            results["slice_range"],
            **results["stack"],
        )
        expected = (results["height"], results["width"])
        if slices.shape[:2] != expected:
            raise DataError(
                f"{results['img_path']}: the image is {slices.shape[:2]} (height, width), its "
                f"annotation says {expected}. Run tools/prepare_data.py again on this data."
            )
        results["img"] = slices
        results["img_shape"] = results["ori_shape"] = slices.shape[:2]
        results["thickness_mm"] = float(thickness_mm)
        return results


@TRANSFORMS.register_module()
class RandomAffineResize(BaseTransform):
    """Shift, scale, rotation, flip and resize as one matrix and one warp over all slices.

    Boxes, masks and RECIST end points go with the image. Shift, scale and rotation are drawn
    together with probability `prob`, the flip on its own. With `prob=0, flip_prob=0` it is the
    plain resize of testing.

    Args:
        size: (height, width) of the output, or one number for both.
        prob, shift, scale, rotation: probability; +- fraction of the image; +- fraction; +- deg.
        flip_prob: of a horizontal flip.
        augment: False leaves the plain resize, whatever the probabilities.
        box_from: 'recist' redraws the box around the moved RECIST end points, +- 5 px (scaled), as
            DeepLesion defines it, where they are known; 'corners' takes the rectangle around the
            moved box's corners (released code), which grows under rotation.
        interpolation: 'linear' or 'cubic' (released code).

    A lesion whose box centre leaves the image, or whose mask becomes empty, is dropped; a region to
    ignore only if nothing of it is left in the image.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        prob: float = 0.8,
        shift: float = 0.04,
        scale: float = 0.2,
        rotation: float = 15.0,
        flip_prob: float = 0.5,
        box_from: str = "recist",
        interpolation: str = "linear",
        augment: bool = True,
    ) -> None:
        if box_from not in ("recist", "corners"):
            raise ValueError(f"box_from must be 'recist' or 'corners', got {box_from!r}")
        if interpolation not in ("linear", "cubic"):
            raise ValueError(f"interpolation must be 'linear' or 'cubic', got {interpolation!r}")
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.prob, self.flip_prob = (prob, flip_prob) if augment else (0, 0)
        self.shift, self.scale, self.rotation = shift, scale, rotation
        self.box_from = box_from
        self.interpolation = cv2.INTER_LINEAR if interpolation == "linear" else cv2.INTER_CUBIC

    def transform(self, results: dict) -> dict:
        height, width = results["img"].shape[:2]
        # The key makes augmentation a function of (seed, epoch, sample); see sampler.EpochSampler.
        rng = np.random.default_rng(results.get("augmentation_key"))
        matrix = self.draw(rng, (height, width))
        if "gt_bboxes" in results:
            self._move_annotations(results, matrix)
        results["img"] = warp(results["img"], matrix, self.size, self.interpolation)
        results["img_shape"] = self.size
        results["scale_factor"] = (self.size[1] / width, self.size[0] / height)
        results["affine"] = matrix
        return results

    def draw(self, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        """(2, 3) matrix from source to output pixel-edge coordinates, (x, y) order."""
        height, width = shape
        matrix = np.vstack([resizing(shape, self.size), (0.0, 0.0, 1.0)])
        to_centre = np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1.0]])
        back = np.array([[1, 0, width / 2], [0, 1, height / 2], [0, 0, 1.0]])
        if rng.random() < self.prob:
            shift_x, shift_y = rng.uniform(-self.shift, self.shift, 2) * (width, height)
            zoom = 1 + rng.uniform(-self.scale, self.scale)
            angle = math.radians(rng.uniform(-self.rotation, self.rotation))
            cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
            turn = np.array([[cos, -sin, shift_x], [sin, cos, shift_y], [0, 0, 1.0]])
            matrix = matrix @ back @ turn @ to_centre
        if rng.random() < self.flip_prob:
            matrix = np.array([[-1, 0, self.size[1]], [0, 1, 0], [0, 0, 1.0]]) @ matrix
        return matrix[:2]

    def _move_annotations(self, results: dict, matrix: np.ndarray) -> None:
        height, width = self.size
        boxes = results["gt_bboxes"].tensor.numpy().astype(np.float64)
        # (n, 4 corners, xy)
        corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
        moved = move(corners, matrix)
        boxes = np.concatenate([moved.min(1), moved.max(1)], axis=1)
        if "gt_recist" in results:
            recist = move(results["gt_recist"], matrix)
            if self.box_from == "recist":
                # Zoomed as the image, which is then resized along each axis.
                resize = resizing(results["img"].shape, self.size).diagonal()
                margin = RECIST_MARGIN * math.sqrt(abs(np.linalg.det(matrix[:, :2])))
                margin = margin * np.sqrt(resize / resize[::-1])
                known = np.isfinite(recist).all((1, 2))
                ends = recist[known]
                boxes[known] = np.concatenate([ends.min(1) - margin, ends.max(1) + margin], axis=1)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        keep = ((centres > 0) & (centres < (width, height))).all(1)
        boxes = boxes.reshape(-1, 2, 2).clip(0, (width, height)).reshape(-1, 4)
        ignored = np.asarray(results.get("gt_ignore_flags", np.zeros(len(boxes))), bool)
        keep[ignored] = (boxes[ignored, 2:] > boxes[ignored, :2]).all(1)
        masks = results.get("gt_masks")
        if masks is not None:
            moved_masks = np.zeros((len(boxes), height, width), np.uint8)
            for i, mask in enumerate(masks.masks):
                moved_masks[i] = warp(
                    mask, matrix, self.size, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT
                )
            keep &= moved_masks.any((1, 2)) | ignored
            results["gt_masks"] = BitmapMasks(moved_masks[keep], height, width)
        results["gt_bboxes"] = HorizontalBoxes(boxes[keep].astype(np.float32))
        for key in ("gt_bboxes_labels", "gt_ignore_flags"):
            if key in results:
                results[key] = results[key][keep]
        if "gt_recist" in results:
            results["gt_recist"] = recist[keep]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(size={self.size}, prob={self.prob}, shift={self.shift}, "
            f"scale={self.scale}, rotation={self.rotation}, flip_prob={self.flip_prob}, "
            f"box_from={self.box_from!r})"
        )


def move(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Applies a (2, 3) matrix to (..., 2) points."""
    return points @ matrix[:, :2].T + matrix[:, 2]


@TRANSFORMS.register_module()
class PackCTInputs(PackDetInputs):
    """Packs a sample: `inputs` (1, D, H, W) int16 HU, and an mmdet `DetDataSample`.

    The metainfo carries the stack's `thickness_mm` to the network, and what evaluation needs:
    `file_name`, `lesions` (the annotations in file coordinates), and where the slice belongs.
    """

    META_KEYS = (
        "img_id",
        "img_path",
        "file_name",
        "ori_shape",
        "img_shape",
        "scale_factor",
        "thickness_mm",
        "file_thickness_mm",
        "spacing_mm",
        "slice_range",
        "patient",
        "study",
        "series",
        "lesions",
    )

    def __init__(self, meta_keys: tuple[str, ...] = META_KEYS) -> None:
        super().__init__(meta_keys)

    def transform(self, results: dict) -> dict:
        # Of a pipeline that does not resize: mmdet's heads divide boxes and masks by it.
        results.setdefault("scale_factor", (1.0, 1.0))
        packed = super().transform(results)
        packed["inputs"] = packed["inputs"][None]
        instances = packed["data_samples"].gt_instances
        if isinstance(instances.get("masks"), BitmapMasks):
            masks = instances.masks
            instances.masks = PackedMasks(masks.masks, masks.height, masks.width)
        return packed


class PackedMasks(BitmapMasks):
    """BitmapMasks that go from process to process as one tensor, a bit a pixel.

    A worker hands a tensor over in shared memory; numpy's arrays go byte by byte through a pipe,
    and a worker whose pipe nobody reads any more blocks in it.
    """

    def __reduce__(self) -> tuple:
        bits = np.packbits(self.masks.astype(bool), axis=-1)
        return unpacked, (torch.from_numpy(bits), self.masks.dtype.str, self.height, self.width)


def unpacked(bits: torch.Tensor, dtype: str, height: int, width: int) -> PackedMasks:
    """(n, height, width / 8) bytes -> the masks."""
    masks = np.unpackbits(bits.numpy(), axis=-1, count=width).astype(dtype)
    return PackedMasks(masks, height, width)
