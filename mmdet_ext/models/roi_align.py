"""RoIAlign as mmcv's, faster where a detector runs on a CPU without autograd: mmcv's walks over the
channels one by one, and here every pixel's channels lie side by side."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads.roi_extractors.base_roi_extractor import BaseRoIExtractor
from torch import Tensor, nn

# Weighted pixels of a pass: an index of 8 bytes and a weight of 4 each.
TAPS = 1 << 20


class InferenceRoIAlign(RoIAlign):
    """mmcv's RoIAlign (Mask R-CNN, ICCV 2017, section 3), with `roi_align` in its place on a CPU
    where autograd does not record.

    Features may lie in any memory format; mmcv's alone would read channels-last ones scrambled.
    """

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """(B, C, H, W) and (N, 5) of index into B, x1, y1, x2, y2 -> (N, C, *output_size)."""
        if not self.is_faster(input, rois):
            # mmcv's reads memory in NCHW order whatever the strides say.
            return super().forward(input.contiguous(), rois.contiguous())
        return roi_align(
            input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        )

    def is_faster(self, input: Tensor, rois: Tensor) -> bool:
        return (
            self.pool_mode == "avg"
            and not self.use_torchvision
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and input.device.type == rois.device.type == "cpu"
            and input.dtype == rois.dtype == torch.float32
        )


def use_inference_roi_align(model: nn.Module) -> bool:
    """Gives a detector's RoI extractors `InferenceRoIAlign` layers for their mmcv `RoIAlign` ones.

    Weights, configs and results stay the same: these layers have no parameters, and they compute
    the same.

    Returns:
        Whether all RoI layers of the detector now take features in any memory format.
    """
    layers = []
    for extractor in model.modules():
        if isinstance(extractor, BaseRoIExtractor):
            for i, layer in enumerate(extractor.roi_layers):
                # Only mmcv's own: what derives from it may compute something else.
                if type(layer) is RoIAlign:
                    layer = extractor.roi_layers[i] = InferenceRoIAlign(
                        output_size=layer.output_size,
                        spatial_scale=layer.spatial_scale,
                        sampling_ratio=layer.sampling_ratio,
                        pool_mode=layer.pool_mode,
                        aligned=layer.aligned,
                        use_torchvision=layer.use_torchvision,
                    )
                layers.append(layer)
    return all(isinstance(layer, InferenceRoIAlign) for layer in layers)


def roi_align(
    features: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Average of bilinear samples in each bin of each RoI.

    A sample's weights are the product of weights along y and along x, so a bin is a weighted sum of
    pixels, rows of a table (B * H * W, C): an embedding bag.

    Args:
        features: (B, C, H, W) float32, fastest in `torch.channels_last` memory.
        rois: (N, 5) float32: index into B, x1, y1, x2, y2 before `spatial_scale`.
        output_size: bins (along y, along x).
        sampling_ratio: samples along each side of a bin; 0: as many as a bin is long, rounded up.
        aligned: pixel centres at 0.5; otherwise at 0, and RoIs are at least one pixel long.

    Returns:
        (N, C, *output_size).

    Raises:
        ValueError: RoIs that are not finite or, with `aligned`, of negative size; an index out of
            the batch.
    """
    batch, channels, height, width = features.shape
    images = rois[:, 0].long()
    boxes = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    start, size = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    if not aligned:
        size = size.clamp(min=1)
    check_rois(images, boxes, size, batch)
    rows, columns = output_size
    table = features.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(0, 2)
    out = table.new_empty(len(rois), rows * columns, channels)

    grid = samples(size, size.new_tensor((columns, rows)), sampling_ratio)
    most = torch.minimum(2 * grid, grid.new_tensor((width, height))).clamp(min=1)
    cost = rows * columns * most.prod(1)
    # A pass is as wide as its largest RoI: RoIs of a size go together, the largest first.
    order = cost.argsort(descending=True, stable=True)
    done = 0
    while done < len(rois):
        now = order[done : done + max(1, int(TAPS // cost[order[done]]))]
        x, x_weight = axis_taps(start[now, 0], size[now, 0], columns, grid[now, 0], width)
        y, y_weight = axis_taps(start[now, 1], size[now, 1], rows, grid[now, 1], height)
        y += (images[now] * height).view(-1, 1, 1)
        pixel = y[:, :, None, :, None] * width + x[:, None, :, None, :]
        weight = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
        bins = F.embedding_bag(
            pixel.flatten(0, 2).flatten(1),
            table,
            mode="sum",
            per_sample_weights=weight.flatten(0, 2).flatten(1),
        )
        out[now] = bins.view(len(now), rows * columns, channels)
        done += len(now)
    return out.transpose(1, 2).contiguous().view(len(rois), channels, rows, columns)


def check_rois(images: Tensor, boxes: Tensor, size: Tensor, batch: int) -> None:
    if not boxes.isfinite().all():
        raise ValueError("RoIs must be finite")
    if (size < 0).any():
        raise ValueError("RoIs must end where they begin or later")
    if ((images < 0) | (images >= batch)).any():
        raise ValueError(
            f"RoIs name images {int(images.min())} to {int(images.max())} of a batch of {batch}"
        )


def samples(size: Tensor, bins: Tensor, sampling_ratio: int) -> Tensor:
    """Samples along each side of a bin, (N, 2) of x and y."""
    if sampling_ratio > 0:
        return torch.full_like(size, sampling_ratio)
    return torch.ceil(size / bins)


def axis_taps(
    start: Tensor, size: Tensor, bins: int, grid: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """The pixels that each bin reads along one axis.

    Args:
        start, size: (N,) of the RoIs, in pixels.
        bins: their number.
        grid: (N,) samples of a bin; none: the bin is 0.
        length: pixels of the map.

    Returns:
        (N, bins, K) indices, and their weights, which add up to at most 1.
    """
    step = (size / bins).view(-1, 1, 1)
    grid = grid.view(-1, 1, 1)
    bin_, sample = torch.arange(bins).view(-1, 1), torch.arange(max(1, int(grid.max())))
    # The order of the operations is mmcv's: whether a sample is out of the map hangs on the last
    # bit.
    position = start.view(-1, 1, 1) + bin_ * step + (sample + 0.5) * step / grid
    # A sample up to one pixel out of the map takes the border's value, one beyond it is 0.
    inside = (position >= -1) & (position <= length) & (sample < grid)
    position = torch.where(inside, position.clamp(0, length - 1), 0.0)
    low = position.floor()
    high = (low + 1).clamp(max=length - 1)
    fraction = position - low
    share = inside / grid.clamp(min=1)
    index = torch.cat((low, high), -1).long()
    weight = torch.cat((share * (1 - fraction), share * fraction), -1)
    # Of few samples a pixel read twice costs less than it takes to find it.
    return merge(index, weight) if index.shape[-1] > 4 else (index, weight)


def merge(index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Adds up the weights of the same pixel, (..., K) -> (..., fewer); what is left over is 0."""
    index, order = index.sort(-1)
    weight = weight.gather(-1, order)
    place = F.pad(index.diff(dim=-1) != 0, (1, 0)).cumsum(-1)
    number = int(place.max()) + 1
    shape = (*index.shape[:-1], number)
    return (
        index.new_zeros(shape).scatter_(-1, place, index),
        weight.new_zeros(shape).scatter_add_(-1, place, weight),
    )
