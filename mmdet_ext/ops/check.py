"""check_operator: whether an operator keeps the promises that the backbone relies on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .conv_depth import fold, unfold
from .slice_conv import SliceConv

CHANNELS, OUTPUTS, SIZE, SLICES = 8, 6, 6, 3


def check_operator(operator: type[SliceConv], **options) -> None:
    """Checks an operator, one of your own or of this package, on small float64 volumes.

        check_operator(NeighbourMeanConv, strength=0.2)

    Its parameters are drawn at random, so that one which starts without effect is checked too. What
    is checked, for 1 x 1 and 3 x 3 kernels:

    - the shape: depth is kept, stride and padding act in-plane, a 2D convolution's state loads;
    - volumes of a batch do not mix;
    - without a `convolve` of its own: every slice of the result is the 2D convolution of that slice
      of `fuse(x)`;
    - `pixelwise`: strips of rows give what the whole map gives;
    - `linear`: a norm folded into the kernel gives what the norm gives afterwards;
    - in place: `inplace=True` changes no result, and without it the input stays as it is;
    - the gradients, against differences; and with activation checkpointing against without;
    - thickness: it plays no part and may be missing; or a missing one, NaN, 0 and negative numbers
      raise ValueError, and at infinity no slice sees another;
    - channels-last memory changes no result, and autocast little;
    - D = 1.

    Args:
        operator: the class.
        options: what it takes besides a convolution's arguments. With `num_slices` that is the
            depth of the volumes, and D = 1 is checked with num_slices=1.

    Raises:
        TypeError: it does not derive from `SliceConv`.
        AssertionError: naming every promise that is not kept, and what to do.
    """
    if not (isinstance(operator, type) and issubclass(operator, SliceConv)):
        raise TypeError(f"{operator!r} does not derive from mmdet_ext.ops.SliceConv")
    broken = []
    for kernel in (1, 3):
        for promise, check in _checks(operator, kernel, options):
            try:
                check()
            except Exception as error:
                broken.append(f"{kernel} x {kernel} kernel, {promise}\n    {_first_lines(error)}")
    if broken:
        listed = "\n  ".join(broken)
        raise AssertionError(f"{operator.__name__} does not keep:\n  {listed}")


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {'; '.join(lines[:3])}"


def _checks(
    operator: type[SliceConv], kernel: int, options: dict
) -> Iterator[tuple[str, Callable[[], None]]]:
    depth = options.get("num_slices", SLICES)
    thickness = torch.tensor([1.5, 5.0], dtype=torch.float64)

    def make(**given) -> SliceConv:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            own = {**options, **given}
            conv = operator(CHANNELS, OUTPUTS, kernel, padding=kernel // 2, **own).double().eval()
            for parameter in conv.parameters():
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        return conv

    def volume(depth: int = depth, size: int = SIZE) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        shape = (2, CHANNELS, depth, size, size)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def shapes() -> None:
        assert make()(volume(), thickness).shape == (2, OUTPUTS, depth, SIZE, SIZE)
        half = make(stride=2)(volume(), thickness)
        assert half.shape == (2, OUTPUTS, depth, SIZE // 2, SIZE // 2), tuple(half.shape)
        flat = nn.Conv2d(CHANNELS, OUTPUTS, kernel).double()
        make().load_weight2d(flat.weight)
        report = make().load_state_dict(flat.state_dict(), strict=False)
        assert not report.unexpected_keys and "weight" not in report.missing_keys, report

    yield "shapes: forward takes (B, C, D, H, W) to (B, C', D, H', W')", shapes

    def apart() -> None:
        conv, x = make(), volume()
        alone = [conv(x[i : i + 1], thickness[i : i + 1]) for i in range(2)]
        _same(conv(x, thickness), torch.cat(alone))

    yield "batch: a volume's result does not depend on the others of the batch", apart

    def slice_by_slice() -> None:
        conv, x = make(), volume()
        slices = [
            F.conv2d(y, conv.weight, conv.bias, padding=kernel // 2)
            for y in conv.fuse(x, thickness).unbind(2)
        ]
        _same(conv(x, thickness), torch.stack(slices, 2))

    if operator.convolve is SliceConv.convolve:
        yield "slices: forward is fuse, then a 2D convolution of every slice", slice_by_slice

    def strips() -> None:
        conv, x = make(), volume()
        for part, whole in (
            (lambda y: conv.fuse(y, thickness), conv.fuse(x, thickness)),
            *([(lambda y: conv(y, thickness), conv(x, thickness))] if kernel == 1 else []),
        ):
            _same(torch.cat([part(y) for y in x.split((2, 3, 1), dim=3)], 3), whole)

    if operator.pixelwise:
        yield "pixelwise: rows do not depend on one another (else set pixelwise = False)", strips

    def norms() -> None:
        x = volume()
        scale, shift = torch.linspace(-1, 2, 2 * OUTPUTS, dtype=torch.float64).view(2, -1)
        for conv in (make(), make(bias=False)):
            after = conv(x, thickness) * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)
            _same(conv(x, thickness, affine=(scale, shift)), after)

    yield "linear: a norm can be folded into weight and bias (else set linear = False)", norms

    @torch.no_grad()
    def in_place() -> None:
        conv, x = make(), volume()
        expected = conv(x, thickness)
        assert torch.equal(x, volume()), "forward changed its input"
        _same(conv(x, thickness, inplace=True), expected)

    yield "in place: fuse_ gives what fuse gives, and fuse leaves its input alone", in_place

    def gradients() -> None:
        conv, x = make(), volume(size=3).requires_grad_()
        parameters = tuple(conv.parameters())

        def run(x: Tensor, *_) -> Tensor:
            return conv(x, thickness)

        torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)

    yield "gradients: those of the input and of every parameter are right", gradients

    def checkpointed() -> None:
        def step(run: Callable[[SliceConv, Tensor], Tensor]) -> list[Tensor]:
            conv, x = make().train(), volume().requires_grad_()
            run(conv, x).square().sum().backward()
            return [x.grad, *(p.grad for p in conv.parameters())]

        plain = step(lambda conv, x: conv(x, thickness))
        again = step(lambda conv, x: checkpoint(conv, x, thickness, use_reentrant=False))
        for a, b in zip(again, plain, strict=True):
            # Data-parallel training would refuse it.
            assert a is not None and b is not None, "a parameter got no gradient"
            _same(a, b)

    yield "checkpointing: a forward pass computed again gives the same gradients", checkpointed

    def thicknesses() -> None:
        conv, x = make(), volume()
        infinite = torch.full_like(thickness, torch.inf)
        given = [conv(x, mm) for mm in (thickness, thickness.flip(0), infinite)]
        if torch.equal(given[0], given[1]) and torch.equal(given[0], given[2]):
            _same(conv(x), given[0])
            return
        for bad in (torch.nan, 0.0, -1.0, None):
            try:
                conv(x, None if bad is None else thickness.new_tensor([5.0, bad]))
            except ValueError:
                continue
            raise AssertionError(f"a thickness of {bad} mm was not refused; call check_thickness")
        for d in range(depth):
            others = -x
            others[:, :, d] = x[:, :, d]
            _same(conv(others, infinite)[:, :, d], given[2][:, :, d])

    yield (
        "thickness: plays no part and may be missing, or is mm, > 0, and at infinity a slice sees "
        "no other",
        thicknesses,
    )

    def memory() -> None:
        conv, x = make(), volume()
        expected = conv(x, thickness)
        last = copy.deepcopy(conv)(x.contiguous(memory_format=torch.channels_last_3d), thickness)
        _same(last, expected)
        _same(conv(unfold(fold(x).contiguous(), 2), thickness), expected)

    yield "memory: channels-last volumes give the same", memory

    def mixed_precision() -> None:
        conv, x = make().float(), volume().float()
        with torch.autocast("cpu", torch.bfloat16):
            # As inside a network, where what comes before has left bfloat16.
            got = conv(x.bfloat16().requires_grad_(), thickness.float()).float()
        got.square().sum().backward()
        expected = conv(x, thickness.float())
        assert (got - expected).norm() <= 0.1 * expected.norm()

    yield "autocast: works forward and backward (bring factors to x.dtype)", mixed_precision

    def one_slice() -> None:
        conv = make(**({"num_slices": 1} if "num_slices" in options else {}))
        out = conv(volume(depth=1), thickness)
        assert out.shape == (2, OUTPUTS, 1, SIZE, SIZE) and out.isfinite().all(), tuple(out.shape)

    yield "one slice: D = 1 works", one_slice


def _same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
