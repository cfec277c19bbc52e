"""What the benchmark fixes, each constant once."""

from __future__ import annotations

SPLITS = {1: "train", 2: "val", 3: "test"}

# The columns of DL_info.csv and how many numbers a cell holds (0: text).
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

THIN_MM = 2.0

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

# Files count pixel centres, mmdet pixel edges. Added here, taken off in froc_metric.py.
PIXEL_CENTRE = 0.5

# DeepLesion draws a box around the RECIST end points with this margin on every side.
RECIST_MARGIN = 5.0
