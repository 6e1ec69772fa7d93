"""Rewards: every file is one, named after what it measures; `visalign list rewards` lists them."""
