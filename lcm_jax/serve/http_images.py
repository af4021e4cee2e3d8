"""POST /v1/images: draws one picture for one JSON request, between two turns of the streams."""

from __future__ import annotations

import asyncio
import copy
import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from lcm_jax.diffusion.samplers import get_sampler
from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.inference.prompt_conditioning import check_prompts
from lcm_jax.serve.codec import decode, encode, from_base64
from lcm_jax.serve.engine import Busy
from lcm_jax.serve.protocol import parse_object
from lcm_jax.serve.service import Service
from lcm_jax.stream.controls import check_text

MOST_BODY = 16_000_000  # bytes of a request
MOST_READ = 16  # requests that are served at once
BODY_SECONDS = 30.0  # within which a request has to arrive
RETRY = {"retry-after": "5"}
MOST_STEPS = 50
MOST_AREA = 4  # of a picture, times that of the model's own size
MOST_KINDS = 8  # kinds of pictures, of which the programs stay compiled


@dataclass(frozen=True, kw_only=True)
class Order:
    """A request, checked when constructed: the fields are the keys of its JSON.

    prompt, negative_prompt: as the controls of a stream (`check_text`). size: [height, width] in pixels. image, mask:
    JPEG or PNG in base64, see `from_base64`. strength: of image-to-image. Raise ValueError,
    which names the key, for a wrong value.

    >>> Order(prompt="red heart", steps=0)
    Traceback (most recent call last):
    ValueError: steps is 0: it must be from 1 to 50
    """

    prompt: str
    negative_prompt: str = ""
    steps: int = 4
    guidance: float | None = None
    seed: int = 0
    size: Any = None
    image: str | None = None
    strength: float | None = None
    mask: str | None = None

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            optional = getattr(type(self), name, "") is None
            if not (type(value) in kinds or (value is None and optional)):
                raise ValueError(f"{name} is {value!r:.80}: it must be {_NAMES[kinds]}")
        for name in ("prompt", "negative_prompt"):
            try:
                check_text(getattr(self, name))
            except ValueError as wrong:
                raise ValueError(f"{name}: {wrong}") from None
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value!r:.80}: it must be from {low:.10g} to {high:.10g}")
        for name in ("strength", "mask"):
            if getattr(self, name) is not None and self.image is None:
                raise ValueError(f"{name} is given without an image")


_KINDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,), "negative_prompt": (str,), "image": (str,), "mask": (str,),
    "steps": (int,), "seed": (int,), "guidance": (int, float), "strength": (int, float),
}  # fmt: skip
_NAMES = {(str,): "a text", (int,): "a whole number", (int, float): "a number"}
_RANGES = (("steps", 1, MOST_STEPS), ("guidance", 0.0, 30.0), ("seed", 0, 2**32 - 1), ("strength", 0.02, 1.0))


@dataclass
class Kind:
    """A kind of pictures, which one program draws. pipe: a copy of the pipeline, whose program goes when it goes."""

    pipe: Pipeline
    compiled: bool = False


class Images:
    """The endpoint of a service: `draw`."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._kinds: OrderedDict[Hashable, Kind] = OrderedDict()  # the one used last at the end
        self._open_requests = 0

    async def draw(self, request: Request) -> Response:
        """Return the picture of a request as PNG, or {"error": ...}."""
        if self._open_requests >= MOST_READ:
            return error(503, f"{self._open_requests} requests are being served: try again later", RETRY)
        self._open_requests += 1
        try:
            return await self._answer(request)
        finally:
            self._open_requests -= 1

    async def _answer(self, request: Request) -> Response:
        loop, service = asyncio.get_running_loop(), self.service
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _body(request)
        except ClientDisconnect:  # nobody reads this
            return error(400, "the client has gone")
        except TimeoutError:
            return error(408, f"the request did not arrive in {BODY_SECONDS:g} seconds")
        if body is None:
            return error(413, f"a request may have at most {MOST_BODY} bytes")
        try:
            options = await loop.run_in_executor(service.requests, self._options, body)
            picture = await self._drawn(options)
            data = await loop.run_in_executor(service.requests, encode, picture)
        except ValueError as wrong:
            return error(400, str(wrong))
        except Busy as busy:
            return error(503, str(busy), RETRY)
        return Response(data, media_type="image/png", headers={"cache-control": "no-store"})

    async def _drawn(self, options: dict[str, Any]) -> np.ndarray:
        key = self._key(options)
        kind = self._kinds.get(key) or Kind(_with_own_programs(self.service.pipe))
        drawing = self.service.engine.call(partial(_draw, kind.pipe, options), compiled=kind.compiled)
        self._kinds[key] = kind
        try:
            picture: np.ndarray = await asyncio.wrap_future(drawing)
        except BaseException as wrong:
            if not kind.compiled:  # a request that is refused costs no other kind its place
                self._kinds.pop(key, None)
            if isinstance(wrong, asyncio.CancelledError) and drawing.cancelled() and self.service.engine.stopping:
                raise Busy("the server is stopping") from None
            raise
        kind.compiled = True
        self._keep(key, kind)
        return picture

    def _keep(self, key: Hashable, kind: Kind) -> None:
        """Keep a kind that is compiled, if need be in the place of the one that was not used for longest."""
        self._kinds[key] = kind
        self._kinds.move_to_end(key)
        compiled = [other for other, of in self._kinds.items() if of.compiled]
        for other in compiled[: max(len(compiled) - MOST_KINDS, 0)]:
            del self._kinds[other]

    def _key(self, options: dict[str, Any]) -> Hashable:
        """Return what the program depends on that draws such a picture."""
        pipe = self.service.pipe
        sampler = get_sampler(options["sampler"]).configured(pipe.spacing, pipe.model.kind)
        return options["size"], "image" in options, "mask" in options, options["guidance"] != 1.0, sampler

    def _options(self, body: bytes) -> dict[str, Any]:
        """Return the pipeline's arguments from a request; called in a worker thread, as pictures are decoded."""
        request = parse_object(body, "the request", '{"prompt": "red heart"}')
        known = [field.name for field in fields(Order)]
        for key in request:
            if key not in known:
                raise ValueError(f"{key!r:.80} is no key of a request: known are {', '.join(known)}")
        if "prompt" not in request:
            raise ValueError('the request must be a JSON object with a "prompt"')
        order, service = Order(**request), self.service
        size = self._size(order.size)
        options = {name: getattr(order, name) for name in ("prompt", "negative_prompt", "steps", "seed", "strength")}
        check_prompts([order.prompt, order.negative_prompt], service.pipe.prompt_syntax, order.steps)
        options |= {"size": size, "sampler": service.config.sampler}
        options["guidance"] = float(service.config.guidance if order.guidance is None else order.guidance)
        for name, text in (("image", order.image), ("mask", order.mask)):
            if text is not None:
                try:
                    options[name] = decode(from_base64(text), size)
                except ValueError as wrong:
                    raise ValueError(f"{name}: {wrong}") from None
        if "mask" in options:
            options["mask"] = options["mask"].mean(axis=-1).astype(np.uint8)
        return options

    def _size(self, size: Any) -> tuple[int, int]:
        """Return the size of the picture, the served one by default."""
        model_size = self.service.config.size
        if size is None:
            return model_size
        if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)):
            raise ValueError(f"size is {size!r:.80}: give [height, width] in pixels")
        if math.prod(size) > MOST_AREA * math.prod(model_size) or max(size) > 10_000:
            model_area = f"{model_size[0]} x {model_size[1]}"
            raise ValueError(f"size is {size}: give one of at most {MOST_AREA} times the area of {model_area}")
        height, width = self.service.pipe.check_size(size)
        return height, width


def _with_own_programs(pipe: Pipeline) -> Pipeline:
    """Return a copy of a pipeline that compiles for itself, so that its programs are freed with it."""
    copied = copy.copy(pipe)
    for program in ("_draw", "_encode_image"):
        copied.__dict__.pop(program, None)
    return copied


def _draw(pipe: Pipeline, options: dict[str, Any]) -> np.ndarray:
    picture: np.ndarray = pipe(**options)[0]
    return picture


def error(status: int, text: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the response {"error": text}.

    >>> error(400, "size is wrong").body
    b'{"error":"size is wrong"}'
    """
    return JSONResponse({"error": text}, status, headers)


async def _body(request: Request) -> bytes | None:
    """Return the body of a request, or None, without reading on, if it is too large."""
    parts, total = [], 0
    async for part in request.stream():
        parts.append(part)
        total += len(part)
        if total > MOST_BODY:
            return None
    return b"".join(parts)
