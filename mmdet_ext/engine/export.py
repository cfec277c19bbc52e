"""A trained KeySliceMaskRCNN as programs that run without MMDetection: what the networks compute
is traced by torch.export, what lies between them is said in a manifest
(`ct_volumes.export_format`).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ct_volumes.export_format import (
    MULTIPLE,
    check_folder,
    read_manifest,
    remove_others,
    write_manifest,
    write_program,
)
from ct_volumes.exported import ExportedDetector
from ct_volumes.onnx_program import open_program as open_onnx
from deeplesion.errors import DataError, UserError, install
from mmdet_ext.engine.exportable import check_exportable, describe
from mmdet_ext.engine.predict import LesionDetector
from mmdet_ext.engine.torch_program import open_program as open_torch

OPENS = {"onnx": open_onnx, "torch-export": open_torch}
LARGEST = 64  # times MULTIPLE: of the sides of an image
NOT_TRACED = (
    "the program {program} cannot be written as {kind}: nothing is exported. In an operator of your"
    " own, Python that looks at values of tensors (if thickness > 2, thickness.tolist()) is the"
    " usual reason: compute with tensors instead (torch.where). torch says: {reason}"
)


class Features(nn.Module):
    """HU and thickness -> features, the RPN's logits and deltas, channels last.

    Windowing is the first thing in the program, so that it is the preprocessor's own.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hu: Tensor, thickness: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1, 1, D, H, W) int16 HU and (1,) mm -> (1, h, w, C), (1, h, w, A), (1, h, w, 4 A)."""
        images = self.model.data_preprocessor.window(hu)
        features = self.model.extract_feat((images, thickness))
        (logits,), (deltas,) = self.model.rpn_head(features)
        return tuple(x.permute(0, 2, 3, 1).contiguous() for x in (features[0], logits, deltas))


class MaskHead(nn.Module):
    """A mask head whose outputs are a tuple, as those of the others are."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """(n, C, 14, 14) -> ((n, K, 28, 28) logits,)."""
        return (self.head(x),)


def export(
    detector: LesionDetector,
    folder: Path,
    kind: str,
    size: Sequence[int] = (),
    progress: bool = False,
) -> dict:
    """Writes a detector's programs and manifest into a folder; returns the manifest.

    Programs take images of any size that is a multiple of 32, unless `size` is given: then of that
    alone. Before the manifest is written, and with it the folder becomes an export, the programs
    are run on noise, and must find what the detector does.

    Args:
        kind: 'onnx' or 'torch-export'.
        size: (height, width), or nothing.
        progress: show a bar; the features' program takes a minute or more.

    Raises:
        UserError: a detector that cannot be exported, a folder of other files, a size that cannot
            be, a library that is missing; a network that cannot be traced; programs that find
            something else.
        WriteError: a file cannot be written.
    """
    check_folder(folder)
    check_exportable(detector)
    size = tuple(size)
    if any(side < 1 or side % MULTIPLE for side in size) or len(size) not in (0, 2):
        raise UserError(f"--size must be a height and a width, multiples of {MULTIPLE}, got {size}")
    if size and detector.size and padded(detector.size) != size:
        raise UserError(
            f"--size {size[0]} {size[1]}: the config brings every slice to"
            f" {detector.size[0]} x {detector.size[1]} pixels. Leave the option out"
        )
    if kind == "onnx":
        need_onnx()
    old = None
    with contextlib.suppress(DataError):  # one of another version, or damaged, is written over
        old = read_manifest(folder)
    manifest = describe(detector, kind, size)
    try:
        steps = tqdm(
            programs(detector, size), desc="exporting", unit="program", leave=False,
            total=2 + detector.with_masks, disable=not progress,
        )  # fmt: skip
        for name, module, inputs, dims in steps:
            try:
                content = traced(module, inputs, dims, kind)
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UserError(
                    NOT_TRACED.format(program=name, kind=kind, reason=reason)
                ) from error
            manifest["programs"][name] = write_program(folder, name, kind, content)
        check(detector, ExportedDetector(folder, OPENS[kind], manifest), size)
    except BaseException:
        if folder.is_dir():
            remove_others(folder, old)
        raise
    write_manifest(folder, manifest)
    return manifest


def need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"--format onnx needs {error.name}: {install('export')}") from None


def padded(size: Iterable[int]) -> tuple[int, ...]:
    return tuple(-(-side // MULTIPLE) * MULTIPLE for side in size)


def programs(detector: LesionDetector, size: tuple[int, ...]) -> Iterable[tuple]:
    """Name, module, example inputs and the sizes that may change, of each program."""
    model = copy.deepcopy(detector.model).cpu().eval().requires_grad_(False)
    for module in model.modules():
        if getattr(module, "with_cp", False):
            module.with_cp = False  # of training alone, and not to be traced
    height, width = size or (3 * MULTIPLE, 4 * MULTIPLE)
    hu = torch.zeros(1, 1, model.num_slices, height, width, dtype=torch.int16)
    sides = {}
    if not size:
        names = (torch.export.Dim(name, min=1, max=LARGEST) for name in ("rows", "columns"))
        sides = {axis: MULTIPLE * side for axis, side in zip((3, 4), names)}
    yield "features", Features(model), (hu, torch.ones(1)), (sides, {})
    number = torch.export.Dim("number", min=1, max=4096)
    for name, (head, example) in heads(model).items():
        yield name, head, (example.expand(3, -1, -1, -1).clone(),), ({0: number},)


def heads(model: nn.Module) -> dict[str, tuple[nn.Module, Tensor]]:
    """The heads of the second stage by their programs' names, and a (1, C, bins, bins) zero of what
    each takes."""
    roi_head = model.roi_head
    found = {"boxes": (roi_head.bbox_head, roi_head.bbox_roi_extractor)}
    if model.with_mask:
        found["masks"] = MaskHead(roi_head.mask_head), roi_head.mask_roi_extractor
    return {
        name: (head, torch.zeros(1, extractor.out_channels, *extractor.roi_layers[0].output_size))
        for name, (head, extractor) in found.items()
    }


def traced(
    module: nn.Module, inputs: tuple[Tensor, ...], dims: tuple[dict, ...], kind: str
) -> bytes:
    """The file of a program.

    The module is traced as autograd would run it: in inference it writes into maps in place, which
    an ONNX runtime does slowly.
    """
    with quiet(), torch.enable_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=dims, strict=False)
        file = BytesIO()
        if kind == "torch-export":
            torch.export.save(program, file)
            return file.getvalue()
        # The exporter's optimizer fails on operators here; onnxruntime optimises by itself.
        onnx = torch.onnx.export(program, optimize=False, dynamo=True, verbose=False)
        return onnx.model_proto.SerializeToString()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's remarks on itself and on libraries that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def check(detector: LesionDetector, exported: ExportedDetector, size: tuple[int, ...] = ()) -> None:
    """Raises UserError if the programs do not compute what the networks do, on noise of two sizes,
    thin, thick and of slices without neighbours."""
    rng = np.random.default_rng(0)
    model = copy.deepcopy(detector.model).cpu().eval()
    module = Features(model)
    sizes = [size] if size else [(2 * MULTIPLE, 3 * MULTIPLE), (3 * MULTIPLE, MULTIPLE)]
    for (height, width), mm in zip(sizes * 3, (1.0, 5.0, np.inf)):
        hu = rng.integers(-1000, 1000, (1, 1, model.num_slices, height, width)).astype(np.int16)
        thickness = np.float32([mm])
        with torch.no_grad():
            expected = module(torch.from_numpy(hu), torch.from_numpy(thickness))
        compare("features", exported.programs["features"](hu, thickness), expected)
    for name, (head, example) in heads(model).items():
        for number in (1, 5):
            x = rng.normal(0, 1, (number, *example.shape[1:])).astype(np.float32)
            with torch.no_grad():
                compare(name, exported.programs[name](x), head(torch.from_numpy(x)))


def compare(name: str, found: Sequence[np.ndarray], expected: Sequence[Tensor]) -> None:
    """Raises UserError if what a program gives is not, to rounding, what its network gives."""
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        other = other.numpy()
        largest = np.abs(other).max()
        if one.shape != other.shape or not np.abs(one - other).max() <= 1e-4 * largest + 1e-6:
            raise UserError(
                f"the program {name} does not give what the network gives (output {number}):"
                " nothing is exported. The exporter of this version of torch, or this network's"
                " operator, is at fault: try --format torch-export, or another version of torch"
            )
