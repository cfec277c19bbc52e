#!/usr/bin/env bash
# The studies of docs/study/operators.md. $1: 7 or 3, operators x policies at so many slices, or
# reach, varied, pretrained. What follows goes to tools/study.py (--seeds 3, --jobs 2, --dry-run,
# --report ...). OPERATORS and POLICIES choose some of them, to have these done first.
set -eu
part=$1
shift
python=${PYTHON:-python}
none=configs/demo/nofusion_3slice.py
align=configs/demo/alignshift_3slice.py
fusion=model.backbone.fusion
train=work_dirs/study/train
test=work_dirs/study/test
weights=docs/study/operators/pretrained/backbone.pth
methods=() common=()

add() {  # NAME OPERATOR OPTION ...: one method more
    local name=$1 operator=$2 config=$none own=()
    shift 2
    case $operator in
        none) ;;
        2.5D) own=(model.backbone.slices_as_channels=True model.backbone.stem=tile) ;;
        TSM) own=($fusion.type=TSMConv $fusion.n_fold=8) ;;
        AlignShift) config=$align ;;
        *) own=($fusion.type="${operator}Conv") ;;
    esac
    methods+=(--variant "$name" "$config" "${own[@]}" "$@")
}

case $part in
    7 | 3)
        policies=${POLICIES-normalize keep_thick}
        reference="none, ${policies%% *}"
        for policy in $policies; do
            for operator in ${OPERATORS-single none 2.5D TSM AlignShift A3D ACS I3D P3D AlignA3D AlignACS}; do
                # One slice is the same with either policy; D = 3 and 7 would repeat each other.
                if [ "$operator" != single ]; then
                    add "$operator, $policy" "$operator" stack.num_slices="$part" stack.policy="$policy"
                elif [ "$part, $policy" = "7, normalize" ]; then
                    add "single slice" none stack.num_slices=1
                fi
            done
        done ;;
    reach)
        reference="none, 3 slices, 6 mm"
        common=(stack.policy=normalize)
        for operator in ${OPERATORS-none A3D}; do
            add "$operator, 3 slices, 6 mm" "$operator" stack.num_slices=3 stack.target_mm=6
            add "$operator, 7 slices, 2 mm" "$operator" stack.num_slices=7 stack.target_mm=0.667
        done ;;
    varied)
        reference="none, 7 slices"
        common=(stack.policy=normalize)
        train=work_dirs/study/train_varied
        test=work_dirs/study/test_varied
        for operator in ${OPERATORS-none A3D AlignShift ACS}; do
            add "$operator, 7 slices" "$operator" stack.num_slices=7
        done
        for operator in none A3D; do
            add "$operator, 3 slices" "$operator" stack.num_slices=3
        done ;;
    pretrained)
        reference=none
        common=(stack.policy=normalize stack.num_slices=7
            model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=$weights)
        for operator in none ${OPERATORS?the three that lead beside none}; do
            add "$operator" "$operator"
        done ;;
    *)
        echo "operators.sh: $part is none of 7, 3, reach, varied, pretrained" >&2
        exit 2 ;;
esac

# All key slices of the second phantom are for testing, whatever split they were drawn for.
if [ ! -f "$test/annotations/all.json" ]; then
    "$python" docs/study/all_key_slices.py "$test/annotations"
fi
if [ "$part" = pretrained ] && [ ! -f $weights ]; then
    single=work_dirs/study/single_slice
    DEEPLESION_ROOT=work_dirs/study/train_single "$python" tools/train.py $none --resume \
        --work-dir $single --cfg-options stack.num_slices=1
    "$python" docs/study/backbone_of.py $single $weights
fi
exec "$python" tools/study.py --out "docs/study/operators/$part" --data "$train" \
    --reference "$reference" "$@" "${methods[@]}" --cfg-options "${common[@]}" \
    test_dataloader.dataset.data_root="$test" test_dataloader.dataset.ann_file=annotations/all.json
