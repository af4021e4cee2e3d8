"""`lcm-jax serve`: the page, the WebSocket, pictures by HTTP, and the check of who may use them."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import signal
import socket
import sys
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.serve.connection import Connection
from lcm_jax.serve.http_images import Images, error
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
        await asyncio.to_thread(service.engine.stop)
        service.pool.shutdown(cancel_futures=True)

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
        self._hosts = {"localhost", config.host, *(urlsplit(origin).hostname for origin in config.origins)}
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
            return await WebSocket(scope, receive, send).send_denial_response(refusal)
        return await refusal(scope, receive, decorated)

    def _refusal(self, connection: HTTPConnection) -> Response | None:
        path, host = connection.url.path, connection.headers.get("host", "")
        if path == "/healthz":
            return None
        name = urlsplit(f"//{host}").hostname or ""
        if self._local and name not in self._hosts and not _is_loopback(name):
            return error(403, f"host name {name!r:.80} is not one of this server; allow its pages with --origin")
        origin = connection.headers.get("origin")
        if origin is not None and not self._allows_origin(origin, host):
            return error(403, f"pages of {origin!r:.80} may not use this server; allow them with --origin")
        if self.config.token is not None and path not in OPEN and not self._has_token(connection, self.config.token):
            return error(401, "a token is needed: give ?token=... or the header Authorization: Bearer ...")
        return None

    def _allows_origin(self, origin: str, host: str) -> bool:
        return urlsplit(origin).netloc == host or origin in self.config.origins or "*" in self.config.origins

    def _has_token(self, connection: HTTPConnection, token: str) -> bool:
        candidates = connection.query_params.getlist("token")
        kind, _, value = connection.headers.get("authorization", "").partition(" ")
        candidates += [value.strip()] if kind.lower() == "bearer" else []
        return any(hmac.compare_digest(candidate.encode(), token.encode()) for candidate in candidates)


class Server(uvicorn.Server):
    """A uvicorn server that says goodbye to its clients before it closes, and stops cleanly on SIGINT and SIGTERM."""

    def __init__(self, service: Service) -> None:
        self.service = service
        # Messages up to twice the limit are read, so that the answer can name the limit.
        super().__init__(
            uvicorn.Config(
                application(service),
                ws="websockets-sansio",
                ws_max_size=2 * MOST_BYTES,
                ws_per_message_deflate=False,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                lifespan="on",
                timeout_graceful_shutdown=5,
            )
        )

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
        return socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as wrong:
        raise OSError(f"cannot listen on {host} port {port}: {wrong.strerror or wrong}") from None


def address(config: Config, listener: socket.socket) -> str:
    """Return the address of the page, with its token."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    query = "" if config.token is None else f"?token={quote(config.token)}"
    return f"http://{host}:{listener.getsockname()[1]}/{query}"


def serve(pipe: Pipeline, config: Config) -> None:
    """Serve a pipeline until SIGINT or SIGTERM.

    It listens before it compiles, so that a taken port is reported at once. Raise OSError as `listen` does.
    """
    # Each long prompt warns, and Python would keep every such text for ever.
    warnings.filterwarnings("ignore", category=UserWarning, module="lcm_jax")
    with listen(config.host, config.port) as listener:
        service = Service(pipe, config)
        print(f"lcm-jax: compiling {config.model} for {config.size[0]} x {config.size[1]} pixels ...", flush=True)
        service.engine.warm(config.controls)
        if not _is_loopback(config.host) and config.token is None:
            print(
                "lcm-jax: anyone who reaches this address can use it; --token TOKEN requires a token", file=sys.stderr
            )
        print(f"lcm-jax: {config.model} is served at {address(config, listener)}", flush=True)
        Server(service).run(sockets=[listener])
    print("lcm-jax: stopped", flush=True)
    if service.engine.compiling:  # a compilation cannot be stopped, and would crash the interpreter at its end
        sys.stderr.flush()
        os._exit(0)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
