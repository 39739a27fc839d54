"""Other programs that generate with the same model, each at its best settings, one file a peer.

    jaxgpt-bench generate --preset gpt2 --peers
    jaxgpt-bench generate --preset gpt2 --peer onnxruntime llama.cpp

Each takes the float32 artifact and is converted to what it loads before anything is timed; what a row's
precision means for it stands in its file. A peer is found by its file: every module of this folder that has
a `PEER` is one, so that another is added by a file alone (see peer.py for what it has to say of itself).
"""

import functools
import importlib
import pkgutil

from jaxgpt_bench.peers.peer import Peer


@functools.cache
def find_peers() -> dict[str, Peer]:
    """Return the peers of this folder by their engine names, in the order of their files."""
    names = [found.name for found in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    peers: list[Peer] = [module.PEER for module in modules if hasattr(module, "PEER")]
    return {peer.engine: peer for peer in peers}
