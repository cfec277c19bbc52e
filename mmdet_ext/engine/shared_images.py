"""Images of a scan that neighbouring stacks have in common, for detectors with attention between
images: each goes through backbone and pyramid once, not once in every stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from mmdet.structures import DetDataSample
from torch import Tensor, nn

# Of a stack: the slice at this place is (1 - weight) * slice near + weight * slice far.
Place = tuple[int, int, float]  # (near, far, weight)
Image = tuple[Place, ...]


class SharedImages:
    """The features of stacks of one scan, which is looked at from head to feet.

    An image is known by what it was made of, so it is the same wherever it comes again: also at an
    end of the scan, beside a gap, between slices. It is forgotten when stacks have moved past its
    first slice. What is kept is what lies within the reach of a stack, however long the scan is.

    Args:
        model: a detector whose `shares_images` is true.
        slices: places -> their (S, 1, H, W) windowed slices, and a sample that says how they were
            made, the same for all of the scan.

    Attributes:
        known: the features of the images that are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        slices: Callable[[Sequence[Place]], tuple[Tensor, DetDataSample]],
    ) -> None:
        self.model, self.slices = model, slices
        self.known: dict[Image, list[Tensor]] = {}
        self.sample: DetDataSample | None = None

    def features(
        self, stacks: Sequence[Sequence[Place]]
    ) -> tuple[tuple[Tensor, ...], DetDataSample]:
        """What `extract_feat` gives of the stacks, and the sample of their slices."""
        bags = [self.model.images_of(stack) for stack in stacks]
        features = self.model.shared_features(bags, self._load, self.known)
        first = _start(bags[-1][0])
        for image in [image for image in self.known if _start(image) < first]:
            del self.known[image]
        return features, self.sample

    def _load(self, images: Sequence[Image]) -> Tensor:
        """(M, 3, H, W), each slice of them windowed and resized once."""
        numbers: dict[Place, int] = {}
        index = [[numbers.setdefault(place, len(numbers)) for place in image] for image in images]
        slices, self.sample = self.slices(list(numbers))
        return slices[torch.tensor(index, device=slices.device)].squeeze(2)


def _start(image: Image) -> int:
    near, far, _ = image[0]
    return min(near, far)
