#!/usr/bin/env bash
# The comparison of docs/missing_labels.md, in the order of its table. Called again it goes on where
# it stopped. $1: seeds, 0 to $1 - 1; the teacher is that of seed 0. What follows goes to
# tools/study.py (--jobs 2 ...). --dry-run ends with the first study, since the second is of what
# its teacher finds.
set -eu
seeds=$1
shift
python=${PYTHON:-python}
work=work_dirs/missing
out=docs/study/missing_labels
none=configs/demo/nofusion_3slice.py
file=train_dataloader.dataset.ann_file
dry=
case " $* " in *" --dry-run "*) dry=yes ;; esac

for phantom in "full --patients 300" "half --patients 300 --unlabelled 0.5" "test --patients 500 --seed 1"; do
    folder=$work/${phantom%% *}
    if [ ! -f "$folder/annotations/test.json" ]; then
        if [ "$dry" ]; then
            echo "$folder is to be made first: call this without --dry-run"
            exit
        fi
        # shellcheck disable=SC2086
        $python tools/make_phantom.py "$folder" --size 128 ${phantom#* }
        $python tools/prepare_data.py "$folder"
    fi
done

study() {  # SEEDS, then --variant ...
    $python tools/study.py --out "$out" --data "$work/half" --reference half --seeds "$@" \
        --cfg-options stack.policy=keep_thick test_dataloader.dataset.data_root="$work/test" \
        test_dataloader.dataset.ann_file=annotations/train.json
}
methods=(--variant half $none --variant full $none train_dataloader.dataset.data_root="$work/full")
study 1 "$@" "${methods[@]}"
if [ "$dry" ]; then exit; fi

# What a teacher finds is kept beside the runs, since its checkpoint is not: the study goes on where
# there is none. Remove the files if the teacher is to be another.
mine() {
    # Folders of runs by other code stay beside it: the study says which one is its own.
    local teacher
    teacher=$out/$($python - "$out/study.json" <<'PYTHON'
import json, sys
from pathlib import Path
runs = json.load(open(sys.argv[1]))["methods"]["half"]["runs"]
print(Path([run["folder"] for run in runs if run["seed"] == 0][-1]).parent / "training")
PYTHON
)
    DEEPLESION_ROOT=$work/half $python tools/mine_lesions.py $none "$teacher" --score 0.5 --as "$1" \
        --out "$out/mined/$1.json" --work-dir "$work/teacher_$1" --cfg-options stack.policy=keep_thick
}
for kind in ignored labels; do
    if [ ! -f "$out/mined/$kind.json" ]; then mine $kind; fi
    cp "$out/mined/$kind.json" "$work/half/annotations/$kind.json"
done
$python - "$work" <<'PYTHON'  # half's key slices with all of their labels
import json, sys
full, half = (f"{sys.argv[1]}/{name}/annotations" for name in ("full", "half"))
complete = json.load(open(f"{full}/train.json"))
names = {image["file_name"] for image in json.load(open(f"{half}/train.json"))["images"]}
complete["images"] = [image for image in complete["images"] if image["file_name"] in names]
ids = {image["id"] for image in complete["images"]}
complete["annotations"] = [a for a in complete["annotations"] if a["image_id"] in ids]
json.dump(complete, open(f"{half}/complete.json", "w"))
PYTHON

methods+=(
    --variant "half, ignored" configs/demo/ignored_regions.py $file=annotations/ignored.json
    --variant "half, labels" $none $file=annotations/labels.json
    --variant "half's slices" $none $file=annotations/complete.json
)
study "$seeds" "$@" "${methods[@]}"
