#!/usr/bin/env bash
# The runs of docs/lits.md, "Whole volumes", on a phantom in LITS_FILES: all goes to $1. Called again
# it goes on where it stopped.
set -eu
out=$1
python=${PYTHON:-python}
mkdir -p "$out"
cat > "$out/images.py" <<CONFIG
_base_ = "$PWD/configs/acs_volumes/shapes_2d.py"
custom_imports = dict(imports=[*_base_.custom_imports.imports, "mmdet_ext.models.deeplab"])
model = dict(
    network=dict(
        _delete_=True, type="DeepLabV3", num_classes=3, depth=18, base_channels=16, channels=32,
        rates=[1, 2, 4], dropout=0.1,
    ),
)
CONFIG
epochs=(train_cfg.max_epochs=240 "param_scheduler.0.milestones=[120,180]" randomness.seed=0)

trained() {  # NAME CONFIG OPTIONS
    "$python" tools/train.py "$2" --work-dir "$out/$1" --resume --cfg-options "${@:3}"
}
tested() {  # NAME OPTIONS
    config=configs/demo/lits_volumes.py
    trained "$1" $config "${epochs[@]}" "${@:2}"
    "$python" tools/test.py $config "$out/$1" --work-dir "$out/$1/test" --cfg-options "${@:2}"
}

trained images "$out/images.py" train_cfg.max_epochs=10 "param_scheduler.0.milestones=[5,8]" \
    randomness.seed=0
tested acs model.fusion.type=ACSConv
tested 25d model.fusion.type=SliceConv
tested i3d model.fusion.type=I3DConv
for part in network encoder; do
    tested "acs_$part" model.fusion.type=ACSConv model.transfer=$part \
        model.pretrained="$out/images/epoch_10.pth"
done
