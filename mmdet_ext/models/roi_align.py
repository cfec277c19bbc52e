"""RoIAlign for inference on a CPU, as two matrix products a region; equal to mmcv's and faster."""

from __future__ import annotations

import torch
from mmcv.ops import RoIAlign
from torch import Tensor, nn

# Regions are computed in groups whose cutouts hold at most so many numbers: a group stays in a
# processor's cache, and the memory is bounded whatever the number and size of the regions.
GROUP_NUMBERS = 1 << 20


class MatrixRoIAlign(RoIAlign):
    """mmcv's RoIAlign, computed at inference on a CPU by `roi_align`; else by mmcv's own code.

    Takes the options of mmcv's. Unlike mmcv's it may be given maps of any memory layout.
    """

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """(B, C, H, W) maps and (R, 5) regions, see `roi_align`, -> (R, C, height, width)."""
        recorded = torch.is_grad_enabled() and (input.requires_grad or rois.requires_grad)
        full = input.dtype in (torch.float32, torch.float64) and input.dtype == rois.dtype
        if (
            torch.is_autocast_enabled("cpu")
            or recorded
            or not full
            or input.device.type != "cpu"
            or self.pool_mode != "avg"
        ):
            # Which reads memory in NCHW order whatever the strides say.
            return super().forward(input.contiguous(), rois)
        return roi_align(
            input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        )


def use_matrix_roi_align(model: nn.Module) -> None:
    """Makes every RoIAlign of a detector a `MatrixRoIAlign`; it has no weights, and nothing of the
    model's names and options changes."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is RoIAlign:
                options = (child.output_size, child.spatial_scale, child.sampling_ratio)
                layer = MatrixRoIAlign(*options, child.pool_mode, child.aligned)
                setattr(module, name, layer.train(child.training))


def roi_align(
    maps: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """RoIAlign (He et al., Mask R-CNN, ICCV 2017, section 3): average pooling of bilinear samples.

    A sample's bilinear weights are a product of one for its row and one for its column, and samples
    lie on a grid. So the average over the samples of all bins is A M B^T, with M the cells of the
    map under the region, A (height, rows of M) the weights along y and B (width, columns of M)
    those along x.

    Args:
        maps: (B, C, H, W), of any memory layout, fastest channels-last.
        rois: (R, 5) number of the image, x1, y1, x2, y2.
        output_size: (height, width) in bins.
        spatial_scale: maps' pixels a unit of the regions' coordinates.
        sampling_ratio: samples along each side of a bin; 0 takes one a pixel, rounded up.
        aligned: pixel centres lie at halves, as mmcv's `aligned`; without it regions are also at
            least one pixel large.

    Returns:
        (R, C, height, width).

    Raises:
        ValueError: a region of an image that is not there; with `aligned`, one that ends before it
            begins.
    """
    images, channels, rows, columns = maps.shape
    if len(rois) and not (rois[:, 0].min() >= 0 and rois[:, 0].max() < images):
        raise ValueError(f"rois name images {rois[:, 0].unique().tolist()}, there are {images}")
    if aligned and (rois[:, 3:] < rois[:, 1:3]).any():
        raise ValueError("a region ends before it begins")
    out = maps.new_empty((len(rois), channels, *output_size))
    height, width = output_size
    options = (spatial_scale, sampling_ratio, aligned)
    along_x = _Side(rois[:, 1], rois[:, 3], columns, width, *options)
    along_y = _Side(rois[:, 2], rois[:, 4], rows, height, *options)
    table = maps.permute(0, 2, 3, 1).reshape(-1, channels)
    corner = (rois[:, 0].long() * rows + along_y.first) * columns + along_x.first
    for group in _groups(along_y.cells, along_x.cells, GROUP_NUMBERS // channels):
        a, b = along_y.weights(group), along_x.weights(group)
        height, width = a.shape[2], b.shape[2]
        # Cells beyond a smaller region of the group have no weight; any will do.
        cells = torch.arange(height)[:, None] * columns + torch.arange(width)
        cells = (corner[group, None, None] + cells).clamp_(max=len(table) - 1)
        cutouts = table.index_select(0, cells.flatten()).view(len(group), height, -1)
        y = torch.bmm(a, cutouts).view(-1, width, channels)
        y = torch.bmm(b.repeat_interleave(a.shape[1], 0), y)
        out[group] = y.view(len(group), *output_size, channels).permute(0, 3, 1, 2)
    return out


class _Side:
    """Regions along one axis: which cells of the map lie under each, and their weights."""

    def __init__(
        self,
        start: Tensor,
        end: Tensor,
        size: int,
        bins: int,
        scale: float,
        sampling_ratio: int,
        aligned: bool,
    ) -> None:
        self.size, self.bins = size, bins
        self.start = start * scale - (0.5 if aligned else 0.0)
        length = (end - start) * scale
        if not aligned:
            length = length.clamp(min=1)
        self.bin = length / bins
        self.samples = (
            torch.full_like(start, sampling_ratio) if sampling_ratio > 0 else self.bin.ceil()
        )
        last = (self.start + length).clamp(0, size - 1).ceil()
        self.first = self.start.clamp(0, size - 1).floor().long()
        self.cells = last.long() - self.first + 1

    def weights(self, group: Tensor) -> Tensor:
        """(n, bins, cells) of each cell in each bin of some regions."""
        samples = self.samples[group, None, None].clamp(min=1)
        number = torch.arange(int(samples.max())).to(samples)
        step = self.bin[group, None, None]
        bins = torch.arange(self.bins).to(samples)[:, None]
        place = self.start[group, None, None] + bins * step + (number + 0.5) * step / samples
        # Samples farther than a pixel outside count as zero, nearer ones as on the border.
        counts = (number < self.samples[group, None, None]) & (place >= -1) & (place <= self.size)
        place = place.clamp(0, self.size - 1)[..., None]
        cells = torch.arange(int(self.cells[group].max())).to(samples)
        hat = 1 - (place - self.first[group, None, None, None] - cells).abs()
        hat = hat.clamp_(min=0) * counts[..., None]
        return hat.sum(2) / samples


def _groups(heights: Tensor, widths: Tensor, most: int):
    """Numbers of regions of similar size, as many as together have `most` cells."""
    sizes = list(zip(heights.tolist(), widths.tolist()))
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    group, height, width = [], 0, 0
    for number in order:
        higher, wider = max(height, sizes[number][0]), max(width, sizes[number][1])
        if group and (len(group) + 1) * higher * wider > most:
            yield torch.tensor(group)
            group, (higher, wider) = [], sizes[number]
        group.append(number)
        height, width = higher, wider
    if group:
        yield torch.tensor(group)
