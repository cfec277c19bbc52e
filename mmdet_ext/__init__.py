"""Context-fusion operators, the 2D-to-3D model and its MMDetection registration."""
