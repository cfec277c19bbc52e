"""What DeepLesion and its benchmark fix: every constant of theirs stands here, and once."""

from __future__ import annotations

# `Train_Val_Test` of DL_info.csv.
SPLITS = {1: "train", 2: "val", 3: "test"}
# Key slices without noisy lesions, as the papers count them.
PUBLISHED_KEY_SLICES = {"train": 22_478, "val": 4_791, "test": 4_817}

# The columns of DL_info.csv, in its order, and how many numbers a cell holds (0: text).
DL_INFO_COLUMNS = {
    "File_name": 0,
    "Patient_index": 1,
    "Study_index": 1,
    "Series_ID": 1,
    "Key_slice_index": 1,
    "Measurement_coordinates": 8,
    "Bounding_boxes": 4,
    "Lesion_diameters_Pixel_": 2,
    "Normalized_lesion_location": 3,
    "Coarse_lesion_type": 1,
    "Possibly_noisy": 1,
    "Slice_range": 2,
    "Spacing_mm_px_": 3,
    "Image_size": 2,
    "DICOM_windows": 2,
    "Patient_gender": 0,
    "Patient_age": 1,
    "Train_Val_Test": 1,
}
# `Coarse_lesion_type`; unknown throughout the training split.
LESION_TYPES = {
    1: "bone",
    2: "abdomen",
    3: "mediastinum",
    4: "liver",
    5: "lung",
    6: "kidney",
    7: "soft tissue",
    8: "pelvis",
    -1: "unknown",
}

# A PNG holds Hounsfield units plus this.
HU_OFFSET = 32768
# Network input: these HU become [0, 255], minus the shift (MULAN's code, AlignShift's and A3D's).
HU_WINDOW = (-1024, 2050)
HU_SHIFT = 50

# A CT pixel and a CT slice measure so much; beyond lie other units (metres, pixels) and mistakes.
SPACING_MM = (0.05, 10.0)
THICKNESS_MM = (0.05, 50.0)
# In pixels: no room is made for a larger image on a damaged header's word.
LARGEST_SIDE = 8192

# Slices of up to this thickness are thin, in every table.
THIN_MM = 2.0

# A box is drawn around the RECIST end points with this margin in px on every side.
RECIST_MARGIN = 5.0
# Files count pixel centres, mmdet and pictures pixel edges: a file's coordinate plus this.
PIXEL_CENTRE = 0.5
