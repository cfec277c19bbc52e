"""Joins train.json, val.json and test.json of a folder into all.json, one file for testing:
python docs/study/all_key_slices.py FOLDER"""

import json
import sys
from pathlib import Path

from deeplesion.conventions import SPLITS
from deeplesion.data.coco import read_json
from deeplesion.files import write_whole

folder = Path(sys.argv[1])
if not folder.is_dir():
    sys.exit(f"{folder} is missing: make and prepare the phantoms first (docs/study/operators.md)")
joined = {"images": [], "annotations": []}
for split in SPLITS.values():
    content = read_json(folder / f"{split}.json", "annotations of a split")
    numbers = {}
    for image in content["images"]:
        numbers[image["id"]] = len(joined["images"]) + 1
        joined["images"].append({**image, "id": numbers[image["id"]]})
    for annotation in content["annotations"]:
        number, image = len(joined["annotations"]) + 1, numbers[annotation["image_id"]]
        joined["annotations"].append({**annotation, "id": number, "image_id": image})
    info = {k: v for k, v in content["info"].items() if k not in ("key_slices", "table_key_slices")}
    joined |= dict(categories=content["categories"], info=info)
write_whole(folder / "all.json", json.dumps(joined))
