# AlignACS x3: ACS with the virtual slices of AlignShift, in no paper. The schedule is ACS's.
_base_ = "acs_3slice.py"
model = dict(backbone=dict(fusion=dict(type="AlignACSConv", ref_thickness=2.0)))

# As for AlignShift: thin data is resampled to 2 mm, thick data keeps its own slices.
stack = dict(policy="keep_thick")
