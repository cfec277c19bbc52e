#!/usr/bin/env bash
# The study of docs/study/operators.md: operators x policies at D = $1 slices. What follows $1 goes
# to tools/study.py (--seeds 3, --jobs 2, --dry-run, --report ...).
set -eu
slices=$1
shift
none=configs/demo/nofusion_3slice.py
align=configs/demo/alignshift_3slice.py
fusion=model.backbone.fusion
folder=$PWD/work_dirs/study/test
parts='["annotations/train.json","annotations/val.json","annotations/test.json"]'

methods=()
if [ "$slices" = 7 ]; then methods+=(--variant "single slice" $none stack.num_slices=1); fi
for policy in normalize keep_thick; do
    add() {  # NAME CONFIG [k=v ...]
        methods+=(--variant "$1, $policy" "${@:2}" stack.num_slices="$slices" stack.policy=$policy)
    }
    add none $none
    add 2.5D $none model.backbone.slices_as_channels=True model.backbone.stem=tile
    add TSM $none $fusion.type=TSMConv $fusion.n_fold=8
    add AlignShift $align
    for name in A3D ACS I3D P3D AlignA3D AlignACS; do
        add $name $none $fusion.type=${name}Conv
    done
done

exec "${PYTHON:-python}" tools/study.py --out "docs/study/operators/$slices" --data work_dirs/study/train \
    --reference "none, normalize" "$@" "${methods[@]}" --cfg-options \
    test_dataloader.dataset.data_root="$folder" test_dataloader.dataset.ann_file="$parts"
