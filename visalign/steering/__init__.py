"""Guided sampling without training: every file is a method."""
