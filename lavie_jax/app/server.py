"""One server for the page and the interface for programs, on one port."""

import asyncio
import contextlib
import errno
import json
import os
import secrets
import shutil
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from absl import logging

from lavie_jax.app.api import ROOT, TYPES, Answer, Api, error
from lavie_jax.app.jobs import BROKEN, JobQueue
from lavie_jax.errors import UserError

INSTALL = 'pip install "lavie_jax[app]", or in a checkout pip install -e ".[app]"'
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    # The page needs nothing from elsewhere, and could not send anything there. Gradio needs inline scripts.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'",
}
YEAR = 365 * 24 * 3600
SLACK = 1 << 20  # bytes of a request around its files

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def check_installed() -> None:
    """Raises UserError if Gradio is not installed."""
    try:
        import gradio  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as missing:
        raise UserError(f"the page needs Gradio ({missing}): {INSTALL}") from missing


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at the address; port 0 takes a free one.

    Raises:
        UserError: the address is in use or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except (OSError, OverflowError) as problem:
        listening.close()
        in_use = isinstance(problem, OSError) and problem.errno == errno.EADDRINUSE
        hint = "in use: end the other program, or choose another --port" if in_use else f"not usable: {problem}"
        raise UserError(f"{host} port {port} is {hint}") from problem
    return listening


class Guard:
    """Limits the size of requests, adds headers, and gives each browser its cookie, around another application."""

    def __init__(self, app: App, *, most_body: int, cookie: str):
        self.app, self.most_body, self.cookie = app, most_body, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.most_body:
            return await self._refuse(send)
        left, started, complete = self.most_body, False, length == "0" and "transfer-encoding" not in headers

        async def counted() -> dict[str, Any]:
            """Receives a part of the body; one without a length ends where it becomes too large."""
            nonlocal left, complete
            message = await receive()
            left -= len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if left < 0:
                if not started:
                    await self._refuse(send)
                return {"type": "http.disconnect"}
            return message

        async def with_headers(message: dict[str, Any]) -> None:
            """Sends a part of the answer, with HEADERS and the cookie; nothing once the request is refused."""
            nonlocal started
            if left < 0:  # refused
                return
            if message["type"] == "http.response.start":
                started = True
                more = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                if not complete:  # the rest of the body is not read
                    more.append((b"connection", b"close"))
                if scope["path"] == "/" and f"{self.cookie}=" not in headers.get("cookie", ""):
                    value = f"{self.cookie}={secrets.token_urlsafe(24)}; Path=/; Max-Age={YEAR}; HttpOnly; SameSite=Lax"
                    more.append((b"set-cookie", value.encode()))
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        await self.app(scope, counted, with_headers)

    async def _refuse(self, send: Send) -> None:
        answer = error(
            413, f"The request is too large: at most {self.most_body // 2**20} MiB are allowed.", "too_large"
        )
        body = json.dumps(answer.content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": pairs})
        await send({"type": "http.response.body", "body": body})


def api_app(api: Api) -> App:
    """Returns the interface for programs as an ASGI application."""
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import FileResponse, JSONResponse, Response

    def response(answer: Answer) -> Response:
        """Returns an answer as HTTP: JSON, or a file."""
        headers = {"Cache-Control": "no-store", **answer.headers}
        if answer.file is None:
            return JSONResponse(dict(answer.content or {}), answer.status, headers)
        headers["Cache-Control"] = "private, max-age=86400"  # a finished file does not change
        how = "attachment" if answer.download else "inline"
        return FileResponse(
            answer.file, media_type=TYPES[answer.file.suffix], filename=answer.file.name, headers=headers,
            content_disposition_type=how,
        )  # fmt: skip

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request. `Api` runs in a thread, because it reads and writes files."""
        request = Request(scope, receive)
        try:
            body = await request.body()
            arguments = (
                request.method,
                scope["path"],
                dict(request.query_params),
                request.headers.get("content-type", ""),
            )
            answer = await asyncio.to_thread(api.answer, *arguments, body)
        except ClientDisconnect:  # or the request became too large
            return
        except Exception:
            logging.exception("a request failed")
            answer = error(500, BROKEN)
        await response(answer)(scope, receive, send)

    return app


def application(api: Api, page: Any, *, most_upload: int, cookie: str) -> App:
    """Returns the whole server as an ASGI application; `page` is a function that returns Gradio's blocks."""
    import gradio as gr
    from fastapi import FastAPI

    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    outer.mount(ROOT, _Whole(api_app(api)))
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    # White text on these colours has a contrast of at least 4.5.
    theme = gr.themes.Default(primary_hue="blue", **fonts).set(
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700", button_primary_background_fill_hover_dark="*primary_800",
        button_cancel_background_fill="#b91c1c", button_cancel_background_fill_hover="#991b1b",
        button_cancel_background_fill_dark="#b91c1c", button_cancel_background_fill_hover_dark="#991b1b",
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700", block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_800", block_title_text_color_dark="*neutral_100",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
    )  # fmt: skip
    from lavie_jax.app.page import CSS, HEAD

    gr.mount_gradio_app(
        outer, page(), path="/", footer_links=[], run_history=False, show_error=False, allowed_paths=[],
        max_file_size=most_upload, ssr_mode=False, theme=theme, css=CSS, head=HEAD,
    )  # fmt: skip
    most_body = most_upload * 4 // 3 + SLACK  # base64 in JSON is a third longer
    return Guard(outer, most_body=most_body, cookie=cookie)


class _Whole:
    """Undoes what mounting does to the path: `Api` knows whole paths."""

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


@contextlib.contextmanager
def uploads_folder(parent: Path) -> Iterator[Path]:
    """Yields a folder for Gradio's uploaded files, which is emptied at the end. Call it before importing Gradio."""
    folder = parent / ".uploads"
    shutil.rmtree(folder, ignore_errors=True)  # of a server that was killed
    folder.mkdir(parents=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def serve(app: App, listening: socket.socket, queue: JobQueue, *, on_start: Callable[[], None]) -> None:
    """Serves until Ctrl-C."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_start()

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=2, server_header=False
    )
    queue.start()
    try:
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again when it has ended
            Server(config).run(sockets=[listening])
    finally:
        if queue.waiting():
            logging.warning("the step that has begun is finished first; Ctrl-C ends at once")
        with contextlib.suppress(KeyboardInterrupt):
            queue.close()


def share(host: str, port: int) -> str:
    """Returns a public address for a server on this machine, which Gradio's makers forward for 72 hours.

    Raises:
        UserError: their servers cannot be reached.
    """
    from gradio import networking

    try:
        return networking.setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
    except Exception as problem:  # of the network, of the downloaded program, of the operating system
        raise UserError(f"no public address could be made: {' '.join(str(problem).split())}") from problem
