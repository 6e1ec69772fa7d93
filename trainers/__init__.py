"""Trainers: every file is an algorithm; `visalign list trainers` lists them."""
