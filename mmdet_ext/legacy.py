"""The geometry of mmdet 1.x, in which the released detectors were trained.

mmdet 1.x counts a box's last pixel in: its box (x1, y1, x2, y2) is x2 - x1 + 1 wide. Written by the
edges of its pixels, (x1, y1, x2 + 1, y2 + 1), the same box has today's width, and its box coder,
IoU, NMS, RoIAlign and pasting of masks become today's. What stays of the old geometry is here
(anchors on whole pixels, where a lesion's box lies) and in configs/_base_/legacy_3slice.py;
docs/converting.md has the list.
"""

from __future__ import annotations

from mmdet.models.task_modules import LegacyAnchorGenerator
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures import SampleList
from torch import Tensor

from mmdet_ext.detector import KeySliceMaskRCNN

# DeepLesion's x1 and x2 are pixel centres. mmdet 1.x took them as first and last pixel; by edges
# that box reaches half a pixel farther on every side than the distance between the two centres.
HALF_PIXEL = 0.5


@TASK_UTILS.register_module()
class WholePixelAnchorGenerator(LegacyAnchorGenerator):
    """mmdet 1.x's anchors (centred on the stride, rounded to whole pixels), given by their edges.

    Takes what mmdet's `AnchorGenerator` takes, but for `center_offset`, which is 0.5.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, center_offset=0.5, **kwargs)

    def gen_single_level_base_anchors(self, *args, **kwargs) -> Tensor:
        """(num_base_anchors, 4) anchors of the first cell."""
        anchors = super().gen_single_level_base_anchors(*args, **kwargs)
        return anchors + anchors.new_tensor([0, 0, 1, 1])


@MODELS.register_module()
class LegacyKeySliceMaskRCNN(KeySliceMaskRCNN):
    """KeySliceMaskRCNN whose boxes are those of mmdet 1.x, by the edges of their pixels.

    Ground truth goes in half a pixel larger on every side, predictions come out half a pixel
    smaller: a box (x1, x2) of pixel centres is in there (x1, x2 + 1).
    """

    def loss(self, batch_inputs: tuple[Tensor, Tensor], batch_data_samples: SampleList) -> dict:
        samples = [sample.new() for sample in batch_data_samples]  # the caller's stay as they are
        for sample in samples:
            sample.gt_instances = sample.gt_instances.new()
            sample.gt_instances.bboxes = grown(sample.gt_instances.bboxes, HALF_PIXEL)
        return super().loss(batch_inputs, samples)

    def predict(self, *args, **kwargs) -> SampleList:
        samples = super().predict(*args, **kwargs)
        for sample in samples:
            sample.pred_instances.bboxes = grown(sample.pred_instances.bboxes, -HALF_PIXEL)
        return samples


def grown(boxes: Tensor, margin: float) -> Tensor:
    """(n, 4) boxes larger by `margin` px on every side."""
    return boxes + boxes.new_tensor([-margin, -margin, margin, margin])
