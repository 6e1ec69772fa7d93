"""Tiny random pipelines of the real classes, one file per family, each saved as the published ones are."""
