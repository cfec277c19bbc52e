"""Volumetric attention: a slice's features, gated by what its neighbours along z hold.

Wang, Han, Wang, Li: "Volumetric Attention for 3D Medical Image Segmentation and Detection",
MICCAI 2019. Needs torch alone. The paper leaves some of it open; what is decided here says so.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SCALES = ("sqrt", "mean", "none")


class _Attention(nn.Module):
    """What channel and spatial attention share: the bag, its target, and the gate on it.

    Args:
        target_in_bag: whether the target attends to itself as well. The paper's text counts it
            among the images of a bag, equation 1 speaks of contextual images.
        initial_gate: what the gate is where its input is zero, which sets the bias of its last
            convolution. Two gates of 0.5 halve pretrained maps twice.
        detach_context: gradients stop at the context images (not at the target).
    """

    def __init__(
        self, target_in_bag: bool = True, initial_gate: float = 0.5, detach_context: bool = False
    ) -> None:
        super().__init__()
        if not 0 < initial_gate < 1:
            raise ValueError(f"initial_gate must be between 0 and 1, got {initial_gate}")
        self.target_in_bag = target_in_bag
        self.initial_gate = initial_gate
        self.detach_context = detach_context

    def open_gate(self, convolution: nn.Conv2d) -> None:
        nn.init.constant_(convolution.bias, math.log(self.initial_gate / (1 - self.initial_gate)))

    def forward(self, bag: Tensor, target: int | None = None) -> Tensor:
        """The target's map times its gate.

        Args:
            bag: (B, N, C, H, W) maps of N images, sorted along z.
            target: which of them is gated; default the middle one.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError: not a bag; no such target; a bag of the target alone that may not attend to
                itself.
        """
        query, context = self.split(bag, target)
        return query * self.gate(query, context)[0]

    def split(self, bag: Tensor, target: int | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) of the target, (B, N', C, H, W) of the images that it attends to."""
        if bag.dim() != 5 or not bag.shape[1]:
            raise ValueError(f"a bag is (B, N, C, H, W), got shape {tuple(bag.shape)}")
        images = bag.shape[1]
        target = images // 2 if target is None else target
        if not 0 <= target < images:
            raise ValueError(f"target is {target}, the bag has images 0 to {images - 1}")
        query = bag[:, target]
        if not (self.detach_context or not self.target_in_bag):
            return query, bag
        others = [bag[:, :target], bag[:, target + 1 :]]
        if self.detach_context:
            others = [each.detach() for each in others]
        if self.target_in_bag:
            others.insert(1, query[:, None])
        elif images == 1:
            raise ValueError("with target_in_bag=False a bag needs images besides its target")
        return query, torch.cat(others, dim=1)

    def gate(self, query: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C or 1, H or 1, W or 1) in (0, 1), and the (B, N') attention that led to it."""
        raise NotImplementedError


class VolumetricChannelAttention(_Attention):
    """Volumetric channel attention, VCA (section 2.2): which channels of the target to keep.

    Averages over the map of the target and of each image, emb(v) = W2 relu(W1 v), are compared;
    softmax over the images; the gate is sigmoid(conv1x1(relu(the attended embedding))), one number
    a channel.

    Args:
        channels: C.
        reduction: W1 maps to C / reduction channels.
        shared_embedding: one embedding for target and bag, as the paper's single emb; False gives
            each its own.
        others: of both attentions, see `VolumetricAttention`.
    """

    def __init__(
        self, channels: int, reduction: int = 16, shared_embedding: bool = True, **others
    ) -> None:
        super().__init__(**others)
        if not 0 < reduction <= channels:
            raise ValueError(f"reduction must be 1 to channels={channels}, got {reduction}")

        def embedding() -> nn.Sequential:
            hidden = channels // reduction
            return nn.Sequential(
                nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
            )

        self.embed = embedding()
        self.embed_query = None if shared_embedding else embedding()
        self.last = nn.Conv2d(channels, channels, 1)
        self.open_gate(self.last)

    def gate(self, query: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        embed_query = self.embed if self.embed_query is None else self.embed_query
        q, keys = embed_query(query.mean((-2, -1))), self.embed(context.mean((-2, -1)))
        attention = products(q, keys).softmax(dim=1)
        attended = torch.einsum("bn,bnc->bc", attention.to(keys.dtype), keys)
        return self.last(attended.relu()[:, :, None, None]).sigmoid(), attention


class VolumetricSpatialAttention(_Attention):
    """Volumetric spatial attention, VSA (section 2.2): which places of the target to keep.

    The maps' largest and mean value over channels become one map by a convolution (7 x 7 here, the
    paper gives no size); the target's is compared with each image's by their product over all
    places; softmax over the images; the gate is sigmoid(conv1x1(relu(the attended map))), one
    number a place. The relu and the form of the last convolution are as in the channel attention.

    Args:
        scale: of the product before the softmax. 'none', as printed, sums over all H W places: on
            real slices the softmax is then one-hot and no gradient reaches the other images. 'sqrt'
            divides by sqrt(H W), 'mean' by H W.
        others: of both attentions, see `VolumetricAttention`.
    """

    def __init__(self, scale: str = "sqrt", shared_embedding: bool = True, **others) -> None:
        super().__init__(**others)
        check_scale(scale)
        self.scale = scale
        self.embed = nn.Conv2d(2, 1, 7, padding=3)
        self.embed_query = None if shared_embedding else nn.Conv2d(2, 1, 7, padding=3)
        self.last = nn.Conv2d(1, 1, 1)
        self.open_gate(self.last)

    def gate(self, query: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        embed_query = self.embed if self.embed_query is None else self.embed_query
        q = embed_query(pooled_over_channels(query))[:, 0]
        keys = self.embed(pooled_over_channels(context.flatten(0, 1)))
        keys = keys.unflatten(0, context.shape[:2])[:, :, 0]
        places = q.shape[-2] * q.shape[-1]
        divisor = {"sqrt": math.sqrt(places), "mean": places, "none": 1}[self.scale]
        attention = (products(q, keys) / divisor).softmax(dim=1)
        attended = torch.einsum("bn,bnhw->bhw", attention.to(keys.dtype), keys)
        return self.last(attended.relu()[:, None]).sigmoid(), attention


class VolumetricAttention(nn.Module):
    """Volumetric attention, VA (Fig. 2): channel attention, then spatial attention on its result.

    The spatial attention compares the refined target with the raw images of the bag, of which the
    unrefined target is one; the paper does not say.

    Args:
        channels: C of the maps.
        channel, spatial: which of the two; at least one.
        reduction: of the channel attention.
        scale: of the spatial attention, 'sqrt', 'mean' or 'none'.
        target_in_bag: whether the target attends to itself as well (the paper is of two minds).
        shared_embedding: one embedding for target and bag.
        initial_gate: what each gate is where its input is zero; 0.5 as printed.
        detach_context: gradients stop at the context images.

    Raises:
        ValueError: an option out of its range, or neither attention.
    """

    def __init__(
        self,
        channels: int,
        channel: bool = True,
        spatial: bool = True,
        reduction: int = 16,
        scale: str = "sqrt",
        target_in_bag: bool = True,
        shared_embedding: bool = True,
        initial_gate: float = 0.5,
        detach_context: bool = False,
    ) -> None:
        super().__init__()
        if not (channel or spatial):
            raise ValueError("volumetric attention needs channel=True or spatial=True")
        # Of a part that is left out, too; but its default need not fit a narrow map.
        if reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {reduction}")
        check_scale(scale)
        common = dict(
            target_in_bag=target_in_bag,
            shared_embedding=shared_embedding,
            initial_gate=initial_gate,
            detach_context=detach_context,
        )
        self.channel = (
            VolumetricChannelAttention(channels, reduction, **common) if channel else None
        )
        self.spatial = VolumetricSpatialAttention(scale, **common) if spatial else None

    def forward(self, bag: Tensor, target: int | None = None) -> Tensor:
        """(B, N, C, H, W) maps sorted along z -> (B, C, H, W), the target's (default: the middle).

        Raises ValueError as `VolumetricChannelAttention.forward` does.
        """
        return self.attend(bag, target)[0]

    def attend(self, bag: Tensor, target: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """`forward`, and the (B, N) attention of each part: {'channel': ..., 'spatial': ...}.

        With `target_in_bag=False` there is one column less: the target's is left out.
        """
        attention = {}
        parts = {"channel": self.channel, "spatial": self.spatial}
        y, context = next(filter(None, parts.values())).split(bag, target)
        for name, part in parts.items():
            if part is not None:
                gate, attention[name] = part.gate(y, context)
                y = y * gate
        return y, attention


def check_scale(scale: str) -> None:
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {SCALES}, got {scale!r}")


def entropy(attention: Tensor) -> Tensor:
    """(B, N) attention -> its mean entropy as a share of the largest, ln N.

    1 is uniform, 0 one-hot; 0 of a single image, which has no choice.
    """
    images = attention.shape[1]
    if images == 1:
        return attention.new_zeros(())
    return torch.special.entr(attention).sum(1).mean() / math.log(images)


def products(query: Tensor, keys: Tensor) -> Tensor:
    """(B, ...) and (B, N, ...) -> (B, N) sums of products, in float32 at least.

    Sums over a whole map leave the range of half precision. Under autocast `mul` and `sum` keep
    float32, a matrix product would not.
    """
    if query.dtype in (torch.float16, torch.bfloat16):
        query, keys = query.float(), keys.float()
    return (query[:, None] * keys).flatten(2).sum(2)


def pooled_over_channels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 2, H, W): the largest and the mean value over channels."""
    return torch.stack([x.amax(1), x.mean(1)], dim=1)
