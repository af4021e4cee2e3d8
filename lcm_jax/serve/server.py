"""`lcm-jax serve`: the page, the WebSocket, pictures by HTTP, and the check of who may use them."""

from __future__ import annotations

import asyncio
import gc
import hmac
import ipaddress
import os
import re
import signal
import socket
import sys
import threading
import warnings
import webbrowser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.serve.connection import Connection
from lcm_jax.serve.http_images import Images, error
from lcm_jax.serve.limits import HTTP, UNREAD_SECONDS, WebSockets
from lcm_jax.serve.protocol import MOST_BYTES
from lcm_jax.serve.service import Config, Service

PAGE = Path(__file__).parent / "page"
FILES = sorted(path.name for path in PAGE.iterdir())
OPEN = {"/healthz", *(f"/{name}" for name in FILES if name != "index.html")}  # without a token
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-cache",
    "permissions-policy": "camera=(self), display-capture=(self), microphone=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def application(service: Service) -> Starlette:
    """Return the ASGI application of a service; its lifespan starts and stops the engine."""

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await service.goodbye()
        await asyncio.to_thread(service.stop)

    async def stream(socket: WebSocket) -> None:
        await Connection(socket, service).run()

    async def page(name: str, _: Request) -> Response:
        return FileResponse(PAGE / name)

    async def health(_: Request) -> Response:
        alive = service.engine.alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(service.metrics(), media_type="text/plain; version=0.0.4")

    async def failed(_: Request, wrong: Exception) -> Response:
        if isinstance(wrong, HTTPException):
            return error(wrong.status_code, wrong.detail, dict(wrong.headers or {}))
        return error(500, "the server failed; its log says why")

    routes = [
        Route("/healthz", health),
        Route("/metrics", metrics),
        Route("/v1/images", Images(service).draw, methods=["POST"]),
        WebSocketRoute("/ws", stream),
        *(Route("/" if path == "index.html" else f"/{path}", partial(page, path)) for path in FILES),
    ]
    handlers: Any = {HTTPException: failed, Exception: failed}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.add_middleware(Guard, config=service.config)
    return app


class Guard:
    """The middleware that refuses requests without the token or from other sites' pages, and adds `HEADERS` to answers.

    A server on a loopback address answers only requests to its own host names: another site could make its own name
    point to this address, and its pages would then count as of the same host (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, config: Config) -> None:
        self.app, self.config = app, config
        origins = (origin.partition("://")[2] for origin in config.origins)
        self._hosts = {"localhost", config.host, *map(_name, origins)}
        self._local = _is_loopback(config.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle an ASGI scope."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)

        async def decorated(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(HTTPConnection(scope))
        if refusal is None:
            return await self.app(scope, receive, decorated)
        if scope["type"] == "websocket":
            with suppress(WebSocketDisconnect):  # it has gone already
                await WebSocket(scope, receive, send).send_denial_response(refusal)
            return None
        return await refusal(scope, receive, decorated)

    def _refusal(self, connection: HTTPConnection) -> Response | None:
        path: str = connection.scope["path"]  # what is routed by; `connection.url` is made up from the header Host
        host = connection.headers.get("host", "")
        if path == "/healthz":
            return None
        name = _name(host)
        if name is None:
            return error(400, f"host {host!r:.80} is not of the form name:port")
        if self._local and name not in self._hosts and not _is_loopback(name):
            return error(403, f"host name {name!r:.80} is not one of this server; allow its pages with --origin")
        origin = connection.headers.get("origin")
        if origin is not None and not self._allows_origin(origin, host):
            return error(403, f"pages of {origin!r:.80} may not use this server; allow them with --origin")
        if self.config.token is not None and path not in OPEN and not self._has_token(connection, self.config.token):
            return error(401, "a token is needed: give ?token=... or the header Authorization: Bearer ...")
        return None

    def _allows_origin(self, origin: str, host: str) -> bool:
        same = host != "" and origin.partition("://")[2] == host
        return same or origin in self.config.origins or "*" in self.config.origins

    def _has_token(self, connection: HTTPConnection, token: str) -> bool:
        candidates = connection.query_params.getlist("token")
        kind, _, value = connection.headers.get("authorization", "").partition(" ")
        candidates += [value.strip()] if kind.lower() == "bearer" else []
        return any(hmac.compare_digest(candidate.encode(), token.encode()) for candidate in candidates)


def uvicorn_config(app: ASGIApp) -> uvicorn.Config:
    """Return uvicorn's configuration for an application, with the limits of `limits`."""
    return uvicorn.Config(
        app,
        http=HTTP,
        ws=WebSockets,
        ws_max_size=2 * MOST_BYTES,  # up to twice the limit is read, so that the answer can name the limit
        ws_per_message_deflate=False,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=5,
    )


class Server(uvicorn.Server):
    """A uvicorn server that says goodbye to its clients before it closes, and stops cleanly on SIGINT and SIGTERM."""

    def __init__(self, service: Service) -> None:
        self.service = service
        super().__init__(uvicorn_config(application(service)))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, say goodbye to the clients, close their connections and stop the engine."""
        for server in self.servers:
            server.close()
        await self.service.goodbye()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to stop, on SIGINT or SIGTERM; a second SIGINT stops without waiting for clients."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raise OSError, which names the address, if that is not possible."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as wrong:
        raise OSError(f"cannot listen on {host} port {port}: {wrong.strerror or wrong}") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # of its connections, which can be closed and wait for a client to read
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * UNREAD_SECONDS))
    return listener


def address(config: Config, listener: socket.socket) -> str:
    """Return the address of the page, with its token."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    query = "" if config.token is None else f"?token={quote(config.token)}"
    return f"http://{host}:{listener.getsockname()[1]}/{query}"


def open_page(config: Config, listener: socket.socket) -> None:
    """Open the page in the browser of this machine, or say that there is none."""
    if config.host in ("0.0.0.0", "::"):  # all addresses: no browser takes that for one
        config = replace(config, host="localhost")
    page = address(config, listener)
    if not webbrowser.open(page):
        print(f"lcm-jax: no browser could be opened here: open {page}", file=sys.stderr)


def serve(pipe: Pipeline, config: Config, *, browser: bool = False) -> None:
    """Serve a pipeline until SIGINT or SIGTERM. browser: open the page as soon as it can be used.

    It listens before it compiles, so that a taken port is reported at once. Raise OSError as `listen` does.
    """
    # Each long prompt warns, and Python would keep every such text for ever.
    warnings.filterwarnings("ignore", category=UserWarning, module="lcm_jax")
    with listen(config.host, config.port) as listener:
        service = Service(pipe, config)
        print(f"lcm-jax: compiling {config.model} for {config.size[0]} x {config.size[1]} pixels ...", flush=True)
        service.engine.warm(config.controls)
        # What was compiled stays. The rest comes and goes with clients, as long as the server runs, so that Python's
        # usual garbage collection has its place, whatever the command line has set for shorter runs.
        gc.collect()
        gc.freeze()
        gc.set_threshold(700, 10, 10)
        if not _is_loopback(config.host) and config.token is None:
            print(
                "lcm-jax: anyone who reaches this address can use it; --token TOKEN requires a token", file=sys.stderr
            )
        print(f"lcm-jax: {config.model} is served at {address(config, listener)}", flush=True)
        if browser:  # it waits until it is answered, and some browsers do not return before they are closed
            threading.Thread(target=open_page, name="lcm-jax browser", args=(config, listener), daemon=True).start()
        Server(service).run(sockets=[listener])
    print("lcm-jax: stopped", flush=True)
    if service.engine.compiling:  # a compilation cannot be stopped, and would crash the interpreter at its end
        sys.stderr.flush()
        os._exit(0)


_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([\w.-]*))(?::\d*)?", re.ASCII | re.IGNORECASE)


def _name(host: str) -> str | None:
    """Return the name of a header Host in lower case, None if it is malformed.

    >>> _name("[::1]:80"), _name("Example.org"), _name("x/healthz?")
    ('::1', 'example.org', None)
    """
    match = _HOST.fullmatch(host)
    return None if match is None else (match[1] or match[2]).lower()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
