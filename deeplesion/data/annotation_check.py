"""What is wrong with the images and annotations of a COCO file, ours or another's."""

from __future__ import annotations

import re
from pathlib import Path

from deeplesion.conventions import LESION_TYPES, PIXEL_CENTRE
from deeplesion.data.plausible import (
    SPACING,
    THICKNESS,
    is_numbers,
    is_spacing,
    is_thickness,
    is_whole,
    short,
)
from deeplesion.data.run_lengths import mask_areas
from deeplesion.errors import DataError

MOST_LISTED = 20
_TYPES = tuple(sorted(LESION_TYPES))
# An image reaches half a pixel beyond its pixels' centres; files are rounded. Those of others count
# pixel edges, which reach a pixel beyond the last centre.
_LOW, _HIGH = PIXEL_CENTRE + 1e-4, 1 + 1e-4


def image_problems(images: list[dict]) -> list[str]:
    """A line for each thing that is wrong; `coco.read_annotations` says what must be there."""
    problems, ids, names = [], set(), set()
    for i, image in enumerate(images):
        name = image.get("file_name")
        where = f"image {i + 1} ({short(name)})"

        def check(field: str, good: bool, expected: str, image=image, where=where) -> None:
            if not good:
                found = short(image[field]) if field in image else "nothing"
                problems.append(f"{where}: {field}: expected {expected}, got {found}")

        text = isinstance(name, str) and name.isprintable()
        sound = text and name.endswith(".png") and ".." not in name.split("/") and name[0] != "/"
        check("file_name", sound, "a name below Images_png, like '000001_01_01/109.png'")
        check("id", is_whole(image.get("id")), "a whole number")
        for field in ("patient", "study", "series"):
            value = image.get(field)
            check(field, value is None or is_whole(value) or isinstance(value, str), "a number")
        for field in ("height", "width"):
            check(field, is_whole(image.get(field), 1, 65_535), "a number of pixels")
        spacing, thickness = image.get("spacing_mm"), image.get("thickness_mm")
        check("spacing_mm", spacing is None or is_spacing(spacing), SPACING)
        check("thickness_mm", thickness is None or is_thickness(thickness), THICKNESS)
        ends = image.get("slice_range")
        if sound and ends is not None:
            key = re.fullmatch(r".+/([0-9]{1,6})\.png", name)
            check("file_name", key is not None, "a name like '000001_01_01/109.png'")
            whole = isinstance(ends, list) and len(ends) == 2 and all(map(is_whole, ends))
            inside = whole and (key is None or ends[0] <= int(key[1]) <= ends[1])
            check("slice_range", inside, "two numbers with the key slice in between")

        for field, value, seen in (("id", image.get("id"), ids), ("file_name", name, names)):
            if isinstance(value, int | str):
                check(field, value not in seen, "one that no other image has")
                seen.add(value)
    return problems


def is_ignored(annotation: dict) -> bool:
    """Whether it is a region to ignore in training, COCO's crowd, and no lesion."""
    return bool(annotation.get("iscrowd"))


def annotation_problems(
    annotations: list[dict], images: list[dict], category: int, regions: bool = False
) -> list[str]:
    """The same of annotations, of sound images and one category, its id.

    regions: whether some may be regions to ignore.
    """
    problems, ids, image_of = [], set(), {image["id"]: image for image in images}
    masks, pixels, most, places, boxes = [], [], [], [], {}
    for i, annotation in enumerate(annotations):
        number, image_id = annotation.get("id"), annotation.get("image_id")
        image = image_of.get(image_id) if is_whole(image_id) else None
        where = f"annotation {i + 1} (id {short(number)}"
        where += f" of {image['file_name']})" if image else ")"

        def check(
            field: str, good: bool, expected: str, annotation=annotation, where=where
        ) -> bool:
            if not good:
                found = short(annotation[field]) if field in annotation else "nothing"
                problems.append(f"{where}: {field}: expected {expected}, got {found}")
            return good

        check("id", is_whole(number) and number not in ids, "a whole number, each but once")
        if is_whole(number):
            ids.add(number)
        check("image_id", image is not None, "the id of one of the images")
        ours = check("category_id", annotation.get("category_id") == category, f"{category}")
        crowd = annotation.get("iscrowd")
        if regions:
            check("iscrowd", crowd in (None, 0, 1), "0, or 1 of a region to ignore in training")
        else:
            known = "0: the benchmark knows no regions to ignore. Take it out of the file"
            check("iscrowd", crowd in (None, 0), known)
        if annotation.get("ignore") not in (None, 0):
            check("ignore", bool(crowd), "0: what tells regions to ignore is iscrowd")
        recist, diameters = annotation.get("recist"), annotation.get("diameters_mm")
        check("recist", recist is None or is_numbers(recist, 8), "8 numbers or null")
        measured = is_numbers(diameters, 2) and min(diameters) > 0
        check("diameters_mm", diameters is None or measured, "2 numbers above 0, or null")
        kind = annotation.get("lesion_type", -1)
        check("lesion_type", is_whole(kind) and kind in _TYPES, f"one of {_TYPES}")
        row = annotation.get("lesion_idx")
        check("lesion_idx", row is None or is_whole(row, 0), "the number of a row or null")
        if image is None:
            continue
        box, size = annotation.get("bbox"), [image["height"], image["width"]]
        good = is_numbers(box, 4)
        if not good:
            check("bbox", False, "x, y, width, height, finite numbers")
        elif min(box[2:]) <= 0:
            good = check("bbox", False, "x, y, width, height, the last two above 0")
        else:
            x, y, width, height = box
            inside = min(x, y) >= -_LOW
            inside &= x + width <= size[1] - 1 + _HIGH and y + height <= size[0] - 1 + _HIGH
            good = check("bbox", inside, f"a box within the image, {size} (height, width)")
        if good and ours:
            first = boxes.setdefault((image_id, *box), i + 1)
            once = f"each lesion once, this is the box of annotation {first}"
            check("bbox", first == i + 1, once)
        mask = annotation.get("segmentation")
        if mask is None or mask == []:
            continue
        if _polygons(mask) or (isinstance(mask, dict) and isinstance(mask.get("counts"), list)):
            check("segmentation", _sound(mask, size), "polygons in pixels, or run lengths")
            continue
        same = isinstance(mask, dict) and mask.get("size") == size
        check("segmentation", same, f"run lengths of the image's size, {size} (height, width)")
        if same:
            masks.append(mask.get("counts"))
            pixels.append(size[0] * size[1])
            most.append(2 * (box[2] + 3) * (box[3] + 3) if good else pixels[-1])
            places.append(where)
    for where, area, limit in zip(places, mask_areas(masks, pixels).tolist(), most):
        if area < 0:
            problems.append(
                f"{where}: segmentation: the run lengths are not those of such an image"
            )
        elif area == 0:
            problems.append(f"{where}: segmentation: the mask is empty")
        elif area > limit:
            problems.append(f"{where}: segmentation: the mask, {area} pixels, is not of its box")
    if boxes and all(box[1] + box[3] <= 1 and box[2] + box[4] <= 1 for box in boxes):
        problems.append("all annotations: bbox: expected pixels, got fractions of the image")
    return problems


def refuse_if(problems: list[str], path: Path, advice: str) -> None:
    """Raises DataError with the number of problems, the first 20 of them and what to do, if there
    are any."""
    if not problems:
        return
    more = len(problems) - MOST_LISTED
    listed = problems[:MOST_LISTED] + ([f"and {more} more"] if more > 0 else [])
    number = f"{path}: {len(problems)} problem{'s'[: len(problems) > 1]}"
    raise DataError("\n  ".join([number, *listed]) + f"\n{advice}")


def _polygons(mask: object) -> bool:
    return isinstance(mask, list) and all(isinstance(polygon, list) for polygon in mask)


def _sound(mask: dict | list, size: list[int]) -> bool:
    """Whether polygons or uncompressed run lengths are what pycocotools can make a mask of."""
    if isinstance(mask, list):
        return all(
            len(polygon) >= 6 and len(polygon) % 2 == 0 and is_numbers(polygon, len(polygon))
            for polygon in mask
        )
    counts = mask["counts"]
    whole = all(is_whole(count, 0, 2**32) for count in counts)
    return whole and mask.get("size") == size and sum(counts) == size[0] * size[1]
