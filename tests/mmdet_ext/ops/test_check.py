"""check_operator passes what is right, and names what is broken in what is not."""

import pytest
import torch
from torch import nn

from mmdet_ext.ops import (
    OPERATORS,
    AlignShiftConv,
    SliceConv,
    TSMConv,
    check_operator,
    check_thickness,
    conv_depth,
    register_operator,
    shift_depth,
)

from .users_operators import OPERATORS_OF_USERS, Blur, GatedConv, NeighbourMean


@pytest.mark.parametrize("operator", OPERATORS_OF_USERS)
def test_operators_of_users_keep_it_without_further_words(operator):
    check_operator(operator)


class CallsItselfPixelwise(Blur):
    pixelwise = True


class CallsItselfLinear(GatedConv):
    linear = True


class LosesTheNorm(SliceConv):
    linear = True

    def convolve(self, x, weight, bias):
        return super().convolve(x, self.weight, self.bias)


class OtherInPlace(NeighbourMean):
    def fuse(self, x, thickness):
        return super().fuse(x, thickness)

    def fuse_(self, x, thickness):
        return x.mul_(2)


class ChangesItsInput(SliceConv):
    def fuse(self, x, thickness):
        with torch.no_grad():
            x += 1
        return x


class MixesTheBatch(SliceConv):
    def fuse(self, x, thickness):
        return x - x.mean(0)


class TakesAnyThickness(SliceConv):
    def fuse(self, x, thickness):
        near = (2 / thickness).clamp(max=1).view(-1, 1, 1, 1, 1)
        return x + near * shift_depth(x, 1)


class FusesAtInfinity(SliceConv):
    def fuse(self, x, thickness):
        if not (thickness > 0).all():
            raise ValueError("thickness must be > 0")
        far = (1 / thickness).view(-1, 1, 1, 1, 1)
        return x + (1 - far) * shift_depth(x, -1)


class FusesForwardAtInfinity(SliceConv):
    def fuse(self, x, thickness):
        thickness = check_thickness(thickness, len(x), "this")
        return x + (1 + 1 / thickness).view(-1, 1, 1, 1, 1) * shift_depth(x, 1)


class NeedsNoParameter(SliceConv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.idle = nn.Parameter(torch.zeros(3))


class ComputesInDouble(SliceConv):
    def fuse(self, x, thickness):
        return x + shift_depth(x, 1) * torch.full((self.in_channels, 1, 1, 1), 0.1).double()


class OtherKeys(SliceConv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kernel = self.weight
        del self.weight

    weight = property(lambda self: self.kernel)


class WrongGradient(SliceConv):
    def fuse(self, x, thickness):
        return x + shift_depth(x, 1).detach()


class NeedsThreeSlices(SliceConv):
    def fuse(self, x, thickness):
        return x + x[:, :, 1:2]


class LosesASlice(SliceConv):
    def convolve(self, x, weight, bias):
        return super().convolve(x, weight, bias)[:, :, 1:]


@pytest.mark.parametrize(
    "operator, promise",
    [
        (CallsItselfPixelwise, "pixelwise: "),
        (CallsItselfLinear, "linear: "),
        (LosesTheNorm, "linear: "),
        (OtherInPlace, "in place: "),
        (ChangesItsInput, "in place: "),
        (MixesTheBatch, "batch: "),
        (TakesAnyThickness, "thickness: .*nan mm was not refused"),
        (FusesAtInfinity, "thickness: "),
        (FusesForwardAtInfinity, "thickness: "),
        (NeedsNoParameter, "checkpointing: .*a parameter got no gradient"),
        (ComputesInDouble, "autocast: "),
        (OtherKeys, "shapes: .*kernel"),
        (WrongGradient, "gradients: "),
        (NeedsThreeSlices, "one slice: "),
        (LosesASlice, "shapes: "),
    ],
)
def test_what_is_broken_is_named(operator, promise):
    with pytest.raises(AssertionError, match=f"(?s){operator.__name__} does not keep:.*{promise}"):
        check_operator(operator)


def test_what_is_no_operator_is_refused():
    with pytest.raises(TypeError, match="does not derive from"):
        check_operator(torch.nn.Conv3d)


def test_what_a_parent_says_does_not_hold_for_a_child_that_overrides():
    class Pools(TSMConv):
        def fuse(self, x, thickness):
            return super().fuse(x, thickness) + x.mean((3, 4), keepdim=True)

    class Scales(TSMConv):
        def convolve(self, x, weight, bias):
            return super().convolve(x, weight.tanh(), bias)

    assert TSMConv.pixelwise and TSMConv.linear
    assert not Pools.pixelwise and Pools.linear and Pools.fuse_ is SliceConv.fuse_
    assert not Scales.pixelwise and not Scales.linear and Scales.fuse_ is TSMConv.fuse_
    check_operator(Pools)
    check_operator(Scales)


def test_what_a_parent_says_does_not_hold_for_a_mixin_either():
    class Pooling:
        def fuse(self, x, thickness):
            return x - x.mean((3, 4), keepdim=True)

    mixed = type("Mixed", (Pooling, TSMConv), {})
    assert not mixed.pixelwise and mixed.linear and mixed.fuse_ is SliceConv.fuse_
    assert type("Child", (mixed,), {}).pixelwise is False
    assert type("Sure", (Pooling, TSMConv), {"pixelwise": True}).pixelwise
    check_operator(mixed)

    class Own:
        def forward(self, x, thickness=None):
            return x

    with pytest.raises(TypeError, match="override fuse or convolve, not forward"):
        type("Mixed", (Own, SliceConv), {})


def test_a_convolution_may_ask_for_the_thickness():
    class Near(SliceConv):
        pixelwise = linear = True

        def convolve(self, x, weight, bias, thickness):
            spacing = (1 / check_thickness(thickness, len(x), "Near")).clamp(max=1)
            weight = torch.stack([0.5 * weight, weight, 0.5 * weight], 2)
            geometry = (self.stride, self.sides, self.dilation, self.groups)
            return conv_depth(x, weight, bias, *geometry, spacing)

    class Flat(Near):
        def convolve(self, x, weight, bias):
            return SliceConv.convolve(self, x, weight, bias)

    check_operator(Near)
    check_operator(Flat)
    conv, x = Near(2, 3, 1), torch.randn(1, 2, 3, 4, 4)
    with torch.no_grad():
        doubled = nn.functional.conv2d(x[:, :, 1], 2 * conv.weight, conv.bias)
        torch.testing.assert_close(conv(x, torch.tensor([torch.inf]))[:, :, 1], doubled)
        with pytest.raises(ValueError, match="Near: slice thickness must be > 0"):
            conv(x, torch.tensor([0.0]), affine=(torch.ones(3), torch.zeros(3)))


def test_forward_is_not_to_be_overridden():
    with pytest.raises(TypeError, match="Own: override fuse or convolve, not forward"):
        type("Own", (SliceConv,), {"forward": lambda self, x, thickness=None: x})


def test_a_learned_alpha_is_refused():
    class Learned(AlignShiftConv):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.log_reference = nn.Parameter(torch.tensor(0.5))

        def alpha(self, thickness, batch):
            return (self.log_reference.exp() / thickness).clamp(max=1)

    with pytest.raises(TypeError, match="Learned: alpha gets no gradient"):
        Learned(8, 4, 1)(torch.zeros(2, 8, 3, 4, 4), torch.tensor([1.0, 5.0]))


def test_what_is_no_operator_does_not_register():
    with pytest.raises(TypeError, match="Linear: an operator derives from"):
        register_operator(nn.Linear)


def test_fuse_in_place_alone_is_refused():
    with pytest.raises(TypeError, match="override fuse as well"):
        type("Half", (SliceConv,), {"fuse_": lambda self, x, thickness: x})


def test_a_name_is_registered_once():
    assert register_operator(TSMConv) is TSMConv
    other = type("TSMConv", (SliceConv,), {})
    with pytest.raises(ValueError, match=r"registered already, from mmdet_ext\.ops\.tsm"):
        register_operator(other)
    assert OPERATORS["TSMConv"] is TSMConv
