"""SliceAttention: what patches of all slices tell of the key slice, by a transformer block.

After SATr ("SATr: Slice Attention with Transformer for Universal Lesion Detection", Li et al.,
MICCAI 2022), from the paper's description. What is decided here says so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmdet.models.layers import SinePositionalEncoding
from torch import Tensor, nn

from mmdet_ext.ops import fold

ACROSS = ("slices", "volume")


class SliceAttention(nn.Module):
    """A map of D slices -> what is added to the map into which the neck squeezes them.

    Each slice is cut into patches, a patch becomes a token (as in ViT, ICLR 2021), tokens go
    through transformer layers, and those of the key slice, the middle one, are projected back to
    the map's channels and up-sampled (bilinear) to its size.

    Decided here: layers are pre-norm with GELU; each slice has a learned embedding, since the order
    of slices counts; the projection starts at zero, so that the network starts as the one without
    attention. The thickness is not seen: slices are known by their place in the stack, as to the
    D x 1 x 1 convolution. Of one slice (2.5D) there is nothing to attend to but the slice itself:
    with `across='slices'` the softmax is 1 and the block is a perceptron on each patch.

    Args:
        channels: C of the map.
        num_slices: D, odd.
        stride: image pixels a cell of the map.
        patch: side of a patch in image pixels, a multiple of the stride; if smaller, one cell.
        embed: size of a token, a multiple of `heads` (across the volume also of 4).
        heads, layers, feedforward, dropout: of the transformer.
        across: among which tokens attention goes: 'slices', the D patches at the same place;
            'volume', all patches of all slices, which then also know their place (sine encoding).

    Raises:
        ValueError: an option out of its range; in `forward`, a map of another depth.
    """

    def __init__(
        self,
        channels: int,
        num_slices: int,
        stride: int = 4,
        patch: int = 16,
        embed: int = 256,
        heads: int = 8,
        layers: int = 1,
        feedforward: int = 512,
        dropout: float = 0.0,
        across: str = "slices",
    ) -> None:
        super().__init__()
        if across not in ACROSS:
            raise ValueError(f"across must be one of {ACROSS}, got {across!r}")
        if num_slices < 1 or num_slices % 2 == 0:
            raise ValueError(f"the key slice is the middle one: num_slices={num_slices} is not odd")
        if patch > stride and patch % stride:
            raise ValueError(f"patch={patch} px is not a multiple of the map's stride {stride}")
        if min(patch, layers, heads, feedforward) < 1:
            raise ValueError("patch, layers, heads and feedforward must be at least 1")
        if embed < 1 or embed % heads or (across == "volume" and embed % 4):
            raise ValueError(f"embed={embed} must be a multiple of heads={heads} (and of 4)")
        self.num_slices, self.across = num_slices, across
        cells = max(1, patch // stride)
        self.embed = nn.Conv2d(channels, embed, cells, stride=cells)
        self.slice_embedding = nn.Parameter(torch.empty(num_slices, embed))
        nn.init.trunc_normal_(self.slice_embedding, std=0.02)
        self.position = None
        if across == "volume":
            self.position = SinePositionalEncoding(embed // 2, normalize=True)

        def layer() -> nn.TransformerEncoderLayer:
            return nn.TransformerEncoderLayer(
                embed, heads, feedforward, dropout, "gelu", batch_first=True, norm_first=True
            )

        self.layers = nn.TransformerEncoder(
            layer(), layers, nn.LayerNorm(embed), enable_nested_tensor=False
        )
        # They are copies of the first, weights and all.
        for further in range(1, layers):
            self.layers.layers[further] = layer()
        self.project = nn.Conv2d(embed, channels, 1)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, C, H, W), the middle slice's. Sides that are no multiple of a
        patch are filled up with zeros."""
        batch, _, depth, height, width = x.shape
        if depth != self.num_slices:
            raise ValueError(
                f"SliceAttention was built for num_slices={self.num_slices}, the volume has "
                f"{depth} slices"
            )
        cells = self.embed.stride[0]
        images, fill = fold(x), (0, -width % cells, 0, -height % cells)
        if any(fill):  # otherwise it would be a copy
            images = F.pad(images, fill)
        tokens = self.embed(images)
        size = tokens.shape[-2:]
        if self.position is not None:
            tokens = tokens + self.position(None, tokens[:1]).to(tokens.dtype)
        # (B, h w, D, E)
        tokens = tokens.flatten(2).unflatten(0, (batch, depth)).permute(0, 3, 1, 2)
        tokens = tokens + self.slice_embedding
        sequences = tokens.flatten(0, 1) if self.across == "slices" else tokens.flatten(1, 2)
        attended = self.layers(sequences).reshape(batch, size[0] * size[1], depth, -1)
        key = attended[:, :, depth // 2].transpose(1, 2).unflatten(2, size)
        y = self.project(key)
        if cells > 1:
            y = F.interpolate(y, scale_factor=cells, mode="bilinear", align_corners=False)
        return y[..., :height, :width]
