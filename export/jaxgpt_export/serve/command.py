"""`jaxgpt-export serve`: artifacts behind the API that OpenAI's clients speak, and a page to look at them.

jaxgpt-export serve --artifact runs/demo/int8-dynamic
jaxgpt-export serve --artifact runs/demo/fp32 runs/demo/int8-dynamic --port 8080
"""

import dataclasses
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxgpt.shared.console import Result, say
from jaxgpt.shared.errors import UserError

if TYPE_CHECKING:
    from jaxgpt_export.serve.served_model import ServedModel

MEGABYTE = 2**20
MOST_RUNNING = 1 << 16  # slots of the native engine


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Serve artifacts over HTTP: OpenAI's API at /v1, a page to try them at /.

    Attributes:
      artifact: artifact folders, each FOLDER, which is called as it is named, or NAME=FOLDER.
      host: address to listen on; the default is reached from this machine only.
      port: 0 takes a free one; the address is said when all is ready.
      api_key: that clients have to send; also JAXGPT_API_KEY.
      cors: origins of web pages that may use the server, such as https://example.com.
      engine: native (C++), torch (the PyTorch module), or auto: native where it can.
      threads: CPU threads; 0 takes all cores that this process may use.
      kv_cache: what keys and values are kept as; auto is fp16, or fp32 beside float32 weights.
      draft_tokens: that are drafted at most where a text is alone and repeats itself.
      max_running: texts of a model that are generated side by side.
      max_waiting: texts that may wait for a slot; more are refused.
      max_seconds: that a text may take, waiting counted; then it ends as it is. 0: any time.
      cache_mb: keys and values of past texts that a model keeps for prompts that begin as they did; the
        memory is taken while nothing runs.
      max_body_mb: size of a request.
      json: print one JSON document with the address on stdout when all is ready.
    """

    artifact: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    cors: tuple[str, ...] = ()
    engine: Literal["auto", "native", "torch"] = "auto"
    threads: int = 0
    kv_cache: Literal["auto", "fp32", "fp16", "int8"] = "auto"
    draft_tokens: int = 8
    max_running: int = 8
    max_waiting: int = 64
    max_seconds: float = 600.0
    cache_mb: int = 256
    max_body_mb: int = 4
    json: bool = False


def serve(options: ServeOptions) -> Result:
    """Run `jaxgpt-export serve` until SIGTERM (exit code 0) or Ctrl-C (130)."""
    folders = _named(options.artifact)
    _check(options)
    key = _key(options.api_key)
    origins = tuple(_origin(page) for page in options.cors)
    from jaxgpt_export.generation.open_session import choose_threads
    from jaxgpt_export.serve.served_model import Limits, open_served_model

    threads = choose_threads(options.threads)
    listener = _listen(options.host, options.port)
    limits = Limits(
        options.max_running,
        options.max_waiting,
        options.max_seconds,
        options.cache_mb * MEGABYTE,
        options.max_body_mb * MEGABYTE,
    )

    def load() -> "list[ServedModel]":
        settings = (limits, options.engine, threads, options.kv_cache, options.draft_tokens)
        return [open_served_model(name, folder, *settings) for name, folder in folders.items()]

    loading = Loading(load)  # beside it the server's modules are imported
    from jaxgpt_export.serve.guard import Rules
    from jaxgpt_export.serve.server import Server

    rules = Rules(options.host, key, origins, limits.body_bytes)
    address = _address(options.host, listener)

    def announce(models: "Sequence[ServedModel]") -> None:
        for model in models:
            say(f"{model.name}: {model.kind}, {model.engine}")
        say(f"serving at {address}")
        if options.json:
            names = [model.name for model in models]
            sys.stdout.write(json.dumps({"address": address, "models": names, "pid": os.getpid()}) + "\n")
            sys.stdout.flush()

    interrupted = Server(loading, rules, limits, announce).run(listener)
    return Result({"address": address, "stopped": True}, interrupted=interrupted)


class Loading:
    """Models that are being loaded in a thread.

    Args:
      load: loads them.
    """

    def __init__(self, load: "Callable[[], list[ServedModel]]") -> None:
        self._load = load
        self._models: list[ServedModel] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="loading", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether they are loaded, or can't be."""
        return not self._thread.is_alive()

    def result(self) -> "list[ServedModel]":
        """Wait; return the models, or raise the error with which loading failed."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._models

    def _run(self) -> None:
        try:
            self._models = self._load()
        except BaseException as error:
            self._error = error


def _named(artifacts: Sequence[str]) -> dict[str, Path]:
    """Return the folder of each model by its name; UserError where two have one name."""
    folders: dict[str, Path] = {}
    for artifact in artifacts:
        name, equals, path = artifact.partition("=")
        if not equals or Path(artifact).is_dir():
            name, path = Path(artifact).resolve().name, artifact
        if name in folders:
            raise UserError(
                f"two artifacts are named {name!r} ({folders[name]}, {path}); give one another name: "
                f"--artifact OTHER={path}"
            )
        if not Path(path).is_dir():
            raise UserError(f"artifact folder {path} is missing; make one with: jaxgpt-export convert")
        folders[name] = Path(path)
    if not folders:
        raise UserError("--artifact names no folder; give at least one")
    return folders


def _check(options: ServeOptions) -> None:
    """Raise UserError where a number is none that makes sense."""
    least = {
        "max_running": 1,
        "max_waiting": 0,
        "max_seconds": 0,
        "cache_mb": 0,
        "max_body_mb": 1,
        "draft_tokens": 0,
    }
    for name, smallest in least.items():
        if not getattr(options, name) >= smallest:  # nan is not either
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is {getattr(options, name)}, expected at least {smallest}")
    if options.max_running > MOST_RUNNING:
        raise UserError(f"--max-running is {options.max_running}, expected at most {MOST_RUNNING}")


def _key(given: str | None) -> str | None:
    """Return the key that clients send, as headers have it; UserError where no header can carry it."""
    name = "JAXGPT_API_KEY" if given is None else "--api-key"
    key = (os.environ.get(name, "") if given is None else given).strip()
    if given is not None and not key:
        raise UserError("--api-key is empty; give a key, or leave it out")
    wrong = next((place for place, sign in enumerate(key, 1) if not " " <= sign <= "~"), None)
    if wrong is not None:
        raise UserError(
            f"{name} can't be sent in a header: its character {wrong} is not printable ASCII, as all are "
            "expected to be; give another key"
        )
    return key or None


def _origin(page: str) -> str:
    """Return the origin of a page as browsers send it; UserError where it is none, or more than one."""
    match = re.fullmatch(r"(([a-z][a-z0-9+.-]*)://[^/?#@*\s]+)/?", page.lower())
    if page in ("*", "null", "file://"):
        return page
    if match is None:
        raise UserError(
            f"--cors {page} is no origin, expected one such as https://example.com, without a path, or *"
        )
    return match[1].removesuffix({"http": ":80", "https": ":443"}.get(match[2], ""))


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; UserError where the address can't be had."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}, expected 0 (a free one) to 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, UnicodeError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(
            f"--host {host} --port {port} can't be listened on ({why}); another --port may, or 0: a free one"
        ) from None
    return listener


def _address(host: str, listener: socket.socket) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"
