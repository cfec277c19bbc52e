"""check_operator passes what is right, and names what is broken in what is not."""

import pytest
import torch

from mmdet_ext.ops import (
    OPERATORS,
    SliceConv,
    TSMConv,
    check_operator,
    register_operator,
    shift_depth,
)

from .users_operators import OPERATORS_OF_USERS, Blur, GatedConv, NeighbourMean


@pytest.mark.parametrize("name", OPERATORS)
def test_every_registered_operator_keeps_the_contract(name):
    for depth in (2, 3):
        check_operator(OPERATORS[name], **({"num_slices": depth} if name == "A3DConv" else {}))


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


def test_fuse_in_place_alone_is_refused():
    with pytest.raises(TypeError, match="override fuse as well"):
        type("Half", (SliceConv,), {"fuse_": lambda self, x, thickness: x})


def test_a_name_is_registered_once():
    assert register_operator(TSMConv) is TSMConv
    other = type("TSMConv", (SliceConv,), {})
    with pytest.raises(ValueError, match=r"registered already, from mmdet_ext\.ops\.tsm"):
        register_operator(other)
    assert OPERATORS["TSMConv"] is TSMConv
