#!/usr/bin/env bash
# The study of docs/study/operators.md: operators x policies at D = $1 slices. What follows $1 goes
# to tools/study.py (--seeds 3, --jobs 2, --dry-run, --report ...). OPERATORS and POLICIES choose
# some of them, to have these done first.
set -eu
slices=$1
shift
none=configs/demo/nofusion_3slice.py
align=configs/demo/alignshift_3slice.py
fusion=model.backbone.fusion
folder=work_dirs/study/test
# All key slices of the second phantom are for testing, whatever split they were drawn for.
if [ ! -f "$folder/annotations/all.json" ]; then
    "${PYTHON:-python}" docs/study/all_key_slices.py "$folder/annotations"
fi

operators=${OPERATORS-single none 2.5D TSM AlignShift A3D ACS I3D P3D AlignA3D AlignACS}
reference=${POLICIES-normalize}
methods=()
for policy in ${POLICIES-normalize keep_thick}; do
    for operator in $operators; do
        config=$none name=$operator options=()
        case $operator in
            none) ;;
            # One slice is the same with either policy; D = 3 and 7 would repeat each other.
            single)
                if [ "$slices" = 7 ] && [ "$policy" = normalize ]; then
                    methods+=(--variant "single slice" $none stack.num_slices=1)
                fi
                continue ;;
            2.5D) options=(model.backbone.slices_as_channels=True model.backbone.stem=tile) ;;
            TSM) options=($fusion.type=TSMConv $fusion.n_fold=8) ;;
            AlignShift) config=$align ;;
            *) options=($fusion.type="${operator}Conv") ;;
        esac
        methods+=(--variant "$name, $policy" "$config" "${options[@]}"
            stack.num_slices="$slices" stack.policy="$policy")
    done
done

exec "${PYTHON:-python}" tools/study.py --out "docs/study/operators/$slices" \
    --data work_dirs/study/train --reference "none, ${reference%% *}" "$@" "${methods[@]}" \
    --cfg-options test_dataloader.dataset.data_root="$folder" \
    test_dataloader.dataset.ann_file=annotations/all.json
