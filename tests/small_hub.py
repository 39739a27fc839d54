"""A small Hugging Face hub on the loopback interface: what huggingface_hub asks for, answered from folders.

A model's faults say what goes wrong with it, by the name of a file: see Faults.
"""

import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

LARGE = (".safetensors", ".bin")  # files that the real hub keeps in LFS, under their sha256


@dataclasses.dataclass
class Model:
    """A model that the hub has.

    Attributes:
      folder: its files.
      commit: what its revision main is.
      card: license, datasets.
      name: what it is called now; empty for the name that it is asked by.
      status: answered to every request instead, such as 401.
      other_bytes: files whose content is sent altered, in the right length.
      cut: files of which half is sent before the connection ends.
      unlisted: files that are listed, and not there.
    """

    folder: Path
    commit: str = "a" * 40
    card: dict[str, object] = dataclasses.field(default_factory=dict)
    name: str = ""
    status: int = 200
    other_bytes: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()


class SmallHub(ThreadingHTTPServer):
    """The server; models by name, and the paths that were asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: dict[str, Model] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def small_hub() -> Iterator[SmallHub]:
    """Serve until the block ends."""
    server = SmallHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def ask_there(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Let huggingface_hub ask an address, in this process and until the test ends."""
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)


class _Handler(BaseHTTPRequestHandler):
    server: SmallHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.server.asked.append(f"{self.command} {path}")
        api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        model = self.server.models.get("/".join(parts[:2]))
        if model is None:
            self._send(
                404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            )
        elif model.status != 200:
            self._send(model.status, b'{"error": "as the test wants it"}', {})
        elif parts[3] not in ("main", model.commit):
            self._send(
                404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no such revision"}
            )
        elif api:
            self._send(200, json.dumps(_info("/".join(parts[:2]), model)).encode(), {})
        else:
            self._file(model, "/".join(parts[4:]))

    def _file(self, model: Model, name: str) -> None:
        file = model.folder / name
        if not file.is_file() or name in model.unlisted:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        content, tag = file.read_bytes(), _hash(file)
        if name in model.other_bytes:
            content = bytes(len(content) - 1) + b"\x01"
        headers = {"X-Repo-Commit": model.commit, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0] or 0)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if start else 200, content[start:], headers, cut=name in model.cut)

    def _send(self, status: int, content: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True


def _hash(file: Path) -> str:
    content = file.read_bytes()
    if file.suffix in LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _info(name: str, model: Model) -> dict[str, object]:
    siblings = []
    for file in sorted(model.folder.iterdir()):
        entry: dict[str, object] = {
            "rfilename": file.name,
            "size": file.stat().st_size,
            "blobId": _hash(file),
        }
        if file.suffix in LARGE:
            entry["lfs"] = {"sha256": _hash(file), "size": file.stat().st_size, "pointerSize": 130}
        siblings.append(entry)
    return {
        "id": model.name or name,
        "sha": model.commit,
        "siblings": siblings,
        "cardData": model.card,
        "private": False,
    }
