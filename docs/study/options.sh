#!/usr/bin/env bash
# The comparisons of docs/options.md, with the phantoms of docs/study/operators.md: $1 is training,
# attention or dino. What follows goes to tools/study.py (--seeds 3, --jobs 2, --dry-run ...).
set -eu
group=$1
shift
none=configs/demo/nofusion_3slice.py
align=configs/demo/alignshift_3slice.py
# Two validations, as in 10 epochs and as DINO's: the best of more would be the better for it.
longer=(train_cfg.max_epochs=20 train_cfg.val_interval=10 param_scheduler.1.T_max=20
    param_scheduler.1.end=20)
attention=(model.neck.attention.type=SliceAttention model.neck.attention.embed=64
    model.neck.attention.heads=4 model.neck.attention.feedforward=128)
folder=work_dirs/study/test

case $group in
    training)
        reference=default
        methods=(
            --variant default $none
            --variant "averaged weights" $none
                default_hooks.averaged_weights.type=AveragedWeightsHook
            --variant "three windows" $none
                "model.data_preprocessor.windows=[(-250,350),(-1024,2050),(-60,140)]"
            --variant "narrow window" $none
                model.data_preprocessor.low=-60 model.data_preprocessor.high=140
            --variant "optimised anchors" $none
                "model.rpn_head.anchor_generator.scales=[5.43,6.2,7.04,8.06]"
            --variant "20 epochs" $none "${longer[@]}"
        ) ;;
    attention)
        reference=AlignShift
        methods=(
            --variant AlignShift $align
            --variant "slice attention" $align "${attention[@]}"
            --variant "slice attention, volume" $align "${attention[@]}"
                model.neck.attention.across=volume
        ) ;;
    dino)
        reference="Mask R-CNN, 20 epochs"
        methods=(
            --variant "$reference" $align "${longer[@]}"
            --variant "DINO, 20 epochs" configs/demo/dino_3slice.py
        ) ;;
    *)
        echo "options.sh: $group is none of training, attention, dino" >&2
        exit 2 ;;
esac

if [ ! -f "$folder/annotations/all.json" ]; then
    "${PYTHON:-python}" docs/study/all_key_slices.py "$folder/annotations"
fi
# Four checkpoints are kept for their mean.
exec "${PYTHON:-python}" tools/study.py --out "docs/study/options/$group" \
    --data work_dirs/study/train --reference "$reference" "$@" "${methods[@]}" \
    --cfg-options stack.policy=keep_thick default_hooks.checkpoint.max_keep_ckpts=4 \
    test_dataloader.dataset.data_root="$folder" \
    test_dataloader.dataset.ann_file=annotations/all.json
