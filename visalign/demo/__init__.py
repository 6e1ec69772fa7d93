"""The Gradio demo: a page with a file per tab. Only these files know Gradio, an optional dependency (extra `demo`)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from visalign.errors import UserError

Names = Sequence[str]


def serve(models: Names, rewards: Names, judges: Names, runs: Path, device: str, host: str, port: int | None) -> int:
    """`visalign demo`: the arguments of `Workshop`, then where to listen; returns once it is interrupted.

    Raises:
        UserError: Gradio isn't installed, or whatever `Workshop` and `launch` refuse.
    """
    if find_spec("gradio") is None:
        raise UserError("the demo needs Gradio: pip install 'visalign[demo]'")
    from visalign.demo import app
    from visalign.demo.workshop import Workshop

    return app.serve(Workshop(models or ("toybox",), rewards, judges, runs, device), host, port)
