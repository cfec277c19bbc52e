"""check_operator: whether an operator keeps what the backbone, the converter and the training rely
on, in double precision on small volumes, in well under a second."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .slice_conv import SliceConv

CHANNELS, OUTPUTS, SLICES = 16, 6, 3
# mm, one a volume. Operators get them in float32, whatever the volumes are in.
THICKNESS = torch.tensor([0.8, 5.0, torch.inf])
Make = Callable[..., SliceConv]


class Promise(NamedTuple):
    """One thing that an operator promises, how to mend it where broken, and who looks: a function
    that makes operators by its argument and raises what it finds."""

    text: str
    mend: str
    check: Callable[[Make], None]


PROMISES: list[Promise] = []


def check_operator(operator: type[SliceConv], **options) -> None:
    """Checks what every operator promises; changes no random state.

    The operators made are of 16 to 6 channels with 1 x 1 and 3 x 3 kernels, in eval mode where not
    said otherwise, each of their parameters moved a little from where it starts, so that a fusion
    that starts as the identity shows. The promises, in the order in which they are checked:

    - (B, C, D, H, W) becomes (B, C', D, H', W') of the same type, also with a stride; D = 1 too.
    - The forward pass is `fuse` on the volumes and then `convolve`; where `convolve` is the one of
      `SliceConv`, a 2D convolution of each slice by itself.
    - `fuse` leaves its input as it is; in place it computes the same.
    - One that says `pixelwise` gives on strips of rows what it gives on the whole.
    - A norm that follows may go into the convolution, if it says `linear`.
    - The volumes of a batch do not mix.
    - Either the thickness plays no part, and may be missing; or a thickness that is missing, of
      another shape, NaN or <= 0 raises ValueError, and at infinity no slice sees another.
    - Every parameter gets a gradient, and the gradients are the numerical ones.
    - Activation checkpointing (in training mode), memory format and autocast change no result.
    - The weight of a 2D convolution loads.

    Args:
        operator: a subclass of `SliceConv`; it need not be registered.
        options: its own, as in a config. `num_slices`, if there, is replaced by the D checked.

    Raises:
        AssertionError: a promise is broken; says which and how to mend it.
        TypeError, ValueError: the operator does not take the options.
    """

    def make(kernel_size: int, depth: int = SLICES, **geometry) -> SliceConv:
        own = dict(options, num_slices=depth) if "num_slices" in options else options
        conv = operator(CHANNELS, OUTPUTS, kernel_size, **geometry, **own).double().eval()
        with torch.no_grad():
            for parameter in conv.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return conv

    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        make(1), make(3, padding=1)  # what it refuses is raised as it is
        for text, mend, check in PROMISES:
            try:
                check(make)
            except Exception as error:
                raise AssertionError(
                    f"{operator.__name__} breaks a promise: {text}. {mend}.\n"
                    f"{type(error).__name__}: {error}"
                ) from error


def promise(text: str, mend: str) -> Callable:
    """Decorator of a function that checks it."""

    def add(check: Callable[[Make], None]) -> Callable[[Make], None]:
        PROMISES.append(Promise(text, mend, check))
        return check

    return add


def volumes(depth: int = SLICES) -> Tensor:
    return torch.randn(len(THICKNESS), CHANNELS, depth, 6, 5, dtype=torch.float64)


def both(make: Make, **options) -> list[SliceConv]:
    """The two kernels of the backbone."""
    return [make(1, **options), make(3, padding=1, **options)]


def same(got: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        got, expected, rtol=1e-9, atol=1e-9, msg=lambda message: f"{what}: {message}"
    )


@promise(
    "the output is (B, C', D, H', W'), of the input's type and finite, for any D and any stride",
    "fuse keeps the shape of its input, convolve the depth; slices that do not exist are zero",
)
def check_shapes(make: Make) -> None:
    # D = 1: there is no neighbour at all.
    for depth, (size, stride) in itertools.product((SLICES, 1), ((1, 1), (3, 1), (3, 2))):
        conv = make(size, depth=depth, stride=stride, padding=size // 2)
        x = volumes(depth)
        fused, out = conv.fuse(x, THICKNESS), conv(x, THICKNESS)
        expected = (len(x), OUTPUTS, depth, -(-6 // stride), -(-5 // stride))
        if fused.shape != x.shape:
            raise ValueError(f"fuse made {tuple(fused.shape)} of {tuple(x.shape)}")
        if out.shape != expected or out.dtype != x.dtype:
            raise ValueError(
                f"{size} x {size}, stride {stride}: {tuple(x.shape)} became {tuple(out.shape)}, "
                f"{out.dtype}, expected {expected}, {x.dtype}"
            )
        if not out.isfinite().all():
            raise ValueError("there are NaN or infinite numbers in the output")


@promise(
    "the forward pass is fuse, then convolve with weight and bias, and is the same every time",
    "override fuse or convolve and nothing between them",
)
def check_slice_by_slice(make: Make) -> None:
    for conv in (*both(make), make(3, stride=2, padding=2, dilation=2, bias=False)):
        x = volumes()
        fused, out = conv.fuse(x, THICKNESS), conv(x, THICKNESS)
        if type(conv).convolve is not SliceConv.convolve:
            same(out, conv.convolve(fused, conv.weight, conv.bias), "forward")
            continue
        kernel = conv.weight if conv.weight.ndim == 5 else conv.weight.unsqueeze(2)
        taps = kernel.shape[2]
        for d in range(SLICES):
            expected = 0 if conv.bias is None else conv.bias.view(-1, 1, 1)
            for j in range(taps):
                if 0 <= (e := d + j - (taps - 1) // 2) < SLICES:
                    expected = expected + F.conv2d(
                        fused[:, :, e], kernel[:, :, j], None, conv.stride, conv.padding,
                        conv.dilation,
                    )  # fmt: skip
            same(out[:, :, d], expected, f"slice {d}")


@promise(
    "fuse leaves its input as it is, and fuse_, which may overwrite it, computes the same",
    "work on x.clone() or out of place in fuse; do in fuse_ what fuse does, or leave it out",
)
def check_in_place(make: Make) -> None:
    for depth in (SLICES, 2, 1):
        for conv in both(make, depth=depth):
            x = volumes(depth)
            kept = x.clone()
            expected = conv(x, THICKNESS, inplace=True)  # autograd records: not in place
            with torch.no_grad():
                same(conv(x, THICKNESS), expected, "where autograd does not record")
                same(x, kept, "the input of fuse")
                same(conv(x, THICKNESS, inplace=True), expected, "in place")


@promise(
    "a class that says pixelwise = True computes on strips of rows what it does on the whole",
    "take the line out of the class, if pixels of a slice meet in fuse (pooling, attention, a norm "
    "over the slice) or, in convolve, beyond the kernel",
)
def check_strips(make: Make) -> None:
    for conv in both(make):
        if not conv.pixelwise:
            continue
        x = volumes()
        run = conv if conv.kernel_size == (1, 1) else conv.fuse
        strips = [run(strip, THICKNESS) for strip in x.split((2, 3, 1), dim=3)]
        same(torch.cat(strips, dim=3), run(x, THICKNESS), "strips")


@promise(
    "the output times a scale plus a shift, one a channel, is what forward(affine=...) gives",
    "a class that says linear = True must use the weight and bias given to convolve, not self's; "
    "take the line out if it normalises the weight, or mixes output channels",
)
def check_folded_norm(make: Make) -> None:
    scale, shift = torch.randn(2, OUTPUTS, dtype=torch.float64)
    for conv in (*both(make), *both(make, bias=False)):
        x = volumes()
        expected = conv(x, THICKNESS) * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)
        same(conv(x, THICKNESS, affine=(scale, shift)), expected, "with the norm folded")


@promise(
    "the volumes of a batch do not mix, and each goes by its own thickness",
    "a thickness (B,) broadcasts as thickness.view(-1, 1, 1, 1, 1); never reduce over dimension 0",
)
def check_batch(make: Make) -> None:
    for conv in both(make):
        x = volumes()
        alone = [conv(x[b : b + 1], THICKNESS[b : b + 1]) for b in range(len(x))]
        same(conv(x, THICKNESS), torch.cat(alone), "in a batch")


@promise(
    "the thickness plays no part, and then may be missing; or one that is missing, of another "
    "shape, NaN or <= 0 raises ValueError, and at infinity no slice sees another",
    "begin fuse with thickness = mmdet_ext.ops.check_thickness(thickness, len(x), "
    "type(self).__name__), and let what comes from other slices vanish as thickness grows",
)
def check_thickness_meaning(make: Make) -> None:
    for conv in both(make):
        x = volumes()
        batch = len(x)
        thin, thick, infinite = (conv(x, torch.full((batch,), mm)) for mm in (0.8, 5.0, torch.inf))
        if torch.equal(thin, thick) and torch.equal(thick, infinite):
            same(conv(x), thin, "without a thickness")
            continue
        bad = [None, torch.ones(batch + 1), *(torch.full((batch,), v) for v in (torch.nan, 0, -1))]
        for value in bad:
            try:
                conv(x, value)
            except ValueError:
                continue
            raise ValueError(f"thickness {value} was taken")
        for d in range(SLICES):
            alone = torch.randn_like(x)
            alone[:, :, d] = x[:, :, d]
            got = conv(alone, torch.full((batch,), torch.inf))[:, :, d]
            same(got, infinite[:, :, d], f"slice {d} among others, at infinity")


@promise(
    "every parameter gets a gradient, and all gradients are the numerical ones",
    "make no parameter that the output does not need (data-parallel training refuses it), detach "
    "nothing, and give an autograd function of your own the gradient of every input",
)
def check_gradients(make: Make) -> None:
    for conv in both(make):
        x = volumes()[:, :, :, :3, :2].contiguous().requires_grad_()
        names, parameters = zip(*conv.named_parameters(), strict=True)

        def run(x, *parameters, conv=conv, names=names):
            given = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(conv, given, (x, THICKNESS))

        gradients = torch.autograd.grad(run(x, *parameters).sum(), parameters, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is None:
                raise ValueError(f"{name} gets no gradient")
        torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@promise(
    "activation checkpointing changes neither outputs nor gradients",
    "let forward depend on its inputs and parameters alone, not on how often it was called",
)
def check_checkpointing(make: Make) -> None:
    for conv in both(make):
        conv.train()
        inputs = [volumes().requires_grad_()]
        inputs.append(inputs[0].detach().clone().requires_grad_())
        state = torch.get_rng_state()
        expected = conv(inputs[0], THICKNESS)
        torch.set_rng_state(state)  # of dropout
        got = checkpoint(conv, inputs[1], THICKNESS, use_reentrant=False)
        same(got, expected, "output")
        parameters = list(conv.parameters())
        wanted = torch.autograd.grad(expected.square().sum(), [inputs[0], *parameters])
        found = torch.autograd.grad(got.square().sum(), [inputs[1], *parameters])
        for a, b in zip(found, wanted, strict=True):
            same(a, b, "gradient")


@promise(
    "the memory format of the input changes no result",
    "use reshape or flatten for view, and nothing that reads strides",
)
def check_memory_formats(make: Make) -> None:
    for conv in both(make):
        x = volumes()
        channels_last = x.contiguous(memory_format=torch.channels_last_3d)
        expected = conv(x, THICKNESS)
        same(conv(channels_last, THICKNESS), expected, "channels-last")
        same(conv(x.mT.contiguous().mT, THICKNESS), expected, "columns first")
        with torch.no_grad():
            same(conv(channels_last, THICKNESS, inplace=True), expected, "channels-last, in place")


@promise(
    "mixed precision (autocast) works, forward and backward",
    "bring what fuse multiplies a volume by to the volume's type: alpha.to(x.dtype)",
)
def check_autocast(make: Make) -> None:
    for conv in both(make):
        conv.float()
        x = volumes().float().requires_grad_()
        expected = conv(x, THICKNESS)
        with torch.autocast("cpu", torch.bfloat16):
            # As in a network, where what comes before left bfloat16.
            got = conv(x.bfloat16(), THICKNESS)
        got.float().square().sum().backward()
        torch.testing.assert_close(
            got.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item()
        )


@promise(
    "the state dict of a 2D convolution loads, with all of its keys",
    "keep weight (C', C / groups, K, K) and bias as SliceConv makes them, or load_weight2d and "
    "_load_from_state_dict as in I3DConv",
)
def check_weights_load(make: Make) -> None:
    for conv in both(make):
        padding = conv.kernel_size[0] // 2
        saved = nn.Conv2d(CHANNELS, OUTPUTS, conv.kernel_size, padding=padding).double()
        report = conv.load_state_dict(saved.state_dict(), strict=False)
        if report.unexpected_keys or {"weight", "bias"} & set(report.missing_keys):
            raise ValueError(str(report))
        loaded = conv.weight.detach().clone()
        conv.load_weight2d(saved.weight)
        same(conv.weight.detach(), loaded, "by load_weight2d and by load_state_dict")
