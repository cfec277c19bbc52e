# Liver and lesions by ACS, from random weights; from torchvision's: see _base_/lits_volumes.py.
_base_ = "../_base_/lits_volumes.py"
model = dict(fusion=dict(type="ACSConv"))
