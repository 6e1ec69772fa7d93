"""The embedded world: coloured shapes on a grey ground, small enough for git and a CPU, hard enough to align."""
