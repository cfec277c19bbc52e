"""The plain baselines that speed is measured against, one module a benchmark; see measure.py."""
