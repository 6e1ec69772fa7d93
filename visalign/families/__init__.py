"""Model families: one file for each kind of diffusers pipeline; the only place that knows it."""
