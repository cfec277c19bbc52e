# AlignA3D x3: A3D with the align factor of AlignShift, in no paper.
_base_ = "_base_/detector.py"
model = dict(backbone=dict(fusion=dict(type="AlignA3DConv", ref_thickness=2.0)))

# As for AlignShift: thin data is resampled to 2 mm, thick data keeps its own slices.
stack = dict(policy="keep_thick")
