"""The routes of `jaxgpt-export serve`, an ASGI application."""

import asyncio
import dataclasses
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from jaxgpt.shared.errors import UserError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxgpt_export.serve.api.answer import COME_AGAIN, Answer, Asked
from jaxgpt_export.serve.api.api_error import ApiError
from jaxgpt_export.serve.api.chat import chat
from jaxgpt_export.serve.api.completions import complete
from jaxgpt_export.serve.api.request_fields import Fields, parse_body
from jaxgpt_export.serve.api.token_routes import detokenize, tokenize, tokenizer_info
from jaxgpt_export.serve.guard import Guard, Rules
from jaxgpt_export.serve.metrics import Metrics
from jaxgpt_export.serve.served_model import ServedModel
from jaxgpt_export.serve.worker import Caller, Job

PLAYGROUND = {  # path: file beside this one, its type
    "/": ("playground.html", "text/html"),
    "/playground.css": ("playground.css", "text/css"),
    "/playground.js": ("playground.js", "text/javascript"),
}
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LEFT = 499  # in the metrics: the client left before its answer began, as nginx counts it
OTHER = "other"  # in the metrics: routes whose requests are counted only where they are refused before
# Of bytes of JSON; what a longer one asks for is read in a thread, and the others' tokens go on.
LONG_BODY = 32 * 1024
READER = ThreadPoolExecutor(1, "reader")  # one: the engine has the cores
CODES = {404: "unknown_route", 405: "method_not_allowed"}

Read = TypeVar("Read")
PostFunction = Callable[[ServedModel, Fields, Caller], Asked | dict[str, Any]]


@dataclasses.dataclass
class State:
    """What the routes share.

    Attributes:
      models: by name, in the order in which they were named; empty while they are loaded.
      draining: new texts are refused, because the server is to end.
      reading: bodies that have not come to their end, and long ones that wait for the thread that reads them.
      seconds: that a text may take.
      metrics: of the server.
    """

    models: dict[str, ServedModel]
    seconds: float
    metrics: Metrics
    draining: bool = False
    reading: set[asyncio.Future[Any]] = dataclasses.field(default_factory=set)


def build_app(state: State, rules: Rules) -> Guard:
    """Return the ASGI application."""
    post: Mapping[str, PostFunction] = {
        "/v1/completions": complete,
        "/v1/chat/completions": chat,
        "/tokenize": lambda model, fields, caller: tokenize(model, fields),
        "/detokenize": lambda model, fields, caller: detokenize(model, fields),
    }
    routes = [
        Route(path, _post_route(state, path, function), methods=["POST"]) for path, function in post.items()
    ]
    get: Mapping[str, Callable[[Request], Response]] = {
        **{path: lambda request: _playground(request.url.path) for path in PLAYGROUND},
        "/health": lambda request: _health(state),
        "/v1/health": lambda request: _health(state),
        "/metrics": lambda request: Response(state.metrics.text(), media_type="text/plain; version=0.0.4"),
        "/tokenizer_info": lambda request: JSONResponse(
            tokenizer_info(_model(state, request.query_params.get("model")))
        ),
        "/v1/models": lambda request: JSONResponse(_models(state)),
        "/v1/models/{name:path}": lambda request: JSONResponse(
            _model(state, request.path_params["name"]).description
        ),
    }
    routes += [Route(path, _get_route(function), methods=["GET"]) for path, function in get.items()]
    handlers: Any = {
        ApiError: lambda request, error: _refuse(error),
        UserError: lambda request, error: _refuse(ApiError(400, str(error))),
        HTTPException: lambda request, error: _refuse(
            ApiError(
                error.status_code,
                _unknown(request, error),
                code=CODES.get(error.status_code),
                headers=dict(error.headers or {}),  # such as Allow
            )
        ),
        ClientDisconnect: lambda request, error: Response(status_code=400),  # nobody is there to read it
        500: lambda request, error: _refuse(ApiError(500, "the server failed; its log says how")),
    }

    def refuse(path: str, error: ApiError) -> Response:
        state.metrics.requests.labels(path if path in post else OTHER, str(error.status)).inc()
        return _refuse(error)

    return Guard(Starlette(routes=routes, exception_handlers=handlers), rules, refuse)


def _post_route(state: State, path: str, function: PostFunction) -> Callable[[Request], Any]:
    async def route(request: Request) -> Any:
        _require_open(state)
        body = await _unless_it_ends(state, asyncio.ensure_future(request.body()))
        fields = parse_body(body)
        name = fields.get("model")
        if name is not None and not isinstance(name, str):
            raise ApiError(400, "model is no text", param="model", code="invalid_value")
        model = _model(state, name)
        _require_open(state)
        caller = Caller(_owner(request), state.seconds, state.metrics.on_tokens)
        if len(body) > LONG_BODY:
            loop = asyncio.get_running_loop()
            asked = await _unless_it_ends(
                state, loop.run_in_executor(READER, function, model, fields, caller)
            )
            _require_open(state)  # it may have begun to end meanwhile
        else:
            asked = function(model, fields, caller)
        if isinstance(asked, dict):
            return JSONResponse(asked)
        return Answer(model, Job(asked.texts, caller), asked.reply, asked.stream)

    return _counted(state, path, route)


def _counted(state: State, path: str, route: Callable[[Request], Any]) -> Callable[[Request], Any]:
    async def counted(request: Request) -> Any:
        def count(status: int) -> None:
            state.metrics.requests.labels(path, str(status)).inc()

        try:
            response = await route(request)
        except ApiError as error:
            count(error.status)
            raise
        except UserError:
            count(400)
            raise
        except ClientDisconnect:
            count(LEFT)
            raise
        except Exception:
            count(500)
            raise
        return _counting(response, count)

    return counted


def _counting(response: Any, count: Callable[[int], None]) -> Any:
    """Return an answer that counts the status with which it begins, or that nobody was there to get it."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        begun: list[int] = []

        async def noting(message: Any) -> None:
            if message["type"] == "http.response.start":
                begun.append(message["status"])
            await send(message)

        try:
            await response(scope, receive, noting)
        except Exception:
            begun = begun or [500]
            raise
        finally:
            count(begun[0] if begun else LEFT)

    return answer


def _get_route(function: Callable[[Request], Response]) -> Callable[[Request], Any]:
    async def route(request: Request) -> Response:
        return function(request)

    return route


async def _unless_it_ends(state: State, reading: asyncio.Future[Read]) -> Read:
    """Return what is read of a request; ApiError where the server begins to end before it is."""
    state.reading.add(reading)
    try:
        return await reading
    except asyncio.CancelledError:
        _require_open(state)
        raise
    finally:
        state.reading.discard(reading)


def _owner(request: Request) -> str:
    return request.client.host if request.client else ""


def _model(state: State, name: str | None) -> ServedModel:
    """Return the model of a name, the first one for none; ApiError where there is no such model."""
    if not state.models:
        raise ApiError(503, "the model is being loaded", code="loading", headers=dict(COME_AGAIN))
    if not name:
        return next(iter(state.models.values()))
    if name not in state.models:
        known = ", ".join(state.models)
        raise ApiError(404, f"there is no model {name!r}, expected {known}", "model", "model_not_found")
    return state.models[name]


def _models(state: State) -> dict[str, Any]:
    _model(state, None)
    return {"object": "list", "data": [model.description for model in state.models.values()]}


def _require_open(state: State) -> None:
    """Raise ApiError while the server is about to end."""
    if state.draining:
        raise ApiError(503, "the server is about to end", code="shutting_down", headers=dict(COME_AGAIN))


def _health(state: State) -> Response:
    _model(state, None)
    _require_open(state)
    failed = [model.name for model in state.models.values() if model.worker.failed]
    if failed:
        raise ApiError(503, f"{', '.join(failed)} failed; restart the server, whose log says how")
    return JSONResponse({"status": "ok"})


def _playground(path: str) -> Response:
    name, kind = PLAYGROUND[path]
    headers = {
        "content-security-policy": CONTENT_POLICY,
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }
    content = (Path(__file__).parent / name).read_text(encoding="utf-8")
    return Response(content, headers=headers, media_type=kind)


def _refuse(error: ApiError) -> Response:
    """Return an error's answer, in ASCII: it may quote what is no text."""
    content = json.dumps(error.body())
    return Response(content, error.status, error.headers, media_type="application/json")


def _unknown(request: Request, error: HTTPException) -> str:
    if error.status_code == 404:
        return f"there is no {request.url.path}; docs/serving.md lists the routes"
    return f"{request.method} {request.url.path}: {error.detail}"


def refuse_more(state: State) -> None:
    """Refuse new texts, and requests that have not come to their end."""
    state.draining = True
    for reading in tuple(state.reading):
        reading.cancel()


async def drain(state: State) -> None:
    """Refuse new texts and unfinished requests, and wait until texts that run or wait are finished."""
    refuse_more(state)
    while not all(model.worker.idle for model in state.models.values()):
        await asyncio.sleep(0.02)
