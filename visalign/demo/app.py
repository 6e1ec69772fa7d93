"""`visalign demo`: the page, and the server behind it. It listens to this machine alone unless it is told otherwise."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

import gradio as gr
from gradio.themes import Default

from visalign.demo import generate, runs, score
from visalign.demo import inputs as given
from visalign.demo.look import CSS
from visalign.demo.workshop import Workshop
from visalign.errors import UserError

WAITING = 100  # visitors in the queue, at most
HOUR = 3600  # seconds after which an upload is deleted
SESSIONS = 500  # whose choices are remembered, at most
INTRO = (
    "# visalign\nReward models say what a picture is worth; here they look for a better one while you watch, judge pictures of yours, "
    "and show what training made of a model."
)
FONT = ["system-ui", "sans-serif"]  # nothing is fetched from elsewhere
MONO = ["ui-monospace", "monospace"]


class Page(gr.Blocks):
    """Blocks that answer a request which can't be read, such as a forged one, by one message instead of a traceback."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        try:
            if given.links(inputs):
                raise ValueError("only uploads are read")
            return await super().preprocess_data(block_fn, inputs, *args, **kwargs)
        except Exception as error:
            given.refuse(error)


def page(workshop: Workshop) -> Page:
    """The page with its three tabs."""
    blocks = Page(title="visalign", analytics_enabled=False, delete_cache=(HOUR // 6, HOUR))
    with blocks:
        gr.Markdown(INTRO, elem_classes="head")
        with gr.Tab("Generate"):
            model = generate.tab(workshop)
        with gr.Tab("Score"):
            score.tab(workshop)
        with gr.Tab("Runs") as shelf:
            connect = runs.tab(workshop)
        connect(blocks, shelf)
        blocks.load(lambda: gr.update(choices=workshop.models()), None, model, show_progress="hidden", api_visibility="private")
    return blocks.queue(max_size=WAITING, default_concurrency_limit=16)


def launch(workshop: Workshop, host: str = "127.0.0.1", port: int | None = None) -> tuple[Page, str]:
    """Start the server; the page and its address.

    Raises:
        UserError: the port is taken, or the host isn't this machine's.
    """
    blocks = page(workshop)
    theme = Default(primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=MONO)
    options: dict[str, Any] = {"server_name": host, "server_port": port, "theme": theme, "head": f"<style>{CSS}</style>"}
    options |= {"footer_links": [], "run_history": False, "enable_monitoring": False, "state_session_capacity": SESSIONS}
    options |= {"max_file_size": f"{given.MEGABYTES}mb", "ssr_mode": False, "mcp_server": False, "pwa": False, "share": False}
    try:
        _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, show_error=False, **options)
    except OSError as error:
        raise UserError(f"can't listen to {host}, port {port or 'any'}: {str(error)[:120]}; choose another --port or --host") from None
    return blocks, address


def serve(workshop: Workshop, host: str, port: int | None) -> int:
    """Load what the page starts with, serve it until interrupted, and leave no uploads behind."""
    with tempfile.TemporaryDirectory(prefix="visalign-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        workshop.warm()
        blocks, address = launch(workshop, host, port)
        print(f"visalign demo: {address} (Ctrl+C ends it)", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            blocks.close(verbose=False)
            workshop.close()
    return 0
