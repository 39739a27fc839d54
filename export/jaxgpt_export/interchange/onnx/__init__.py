"""A float32 artifact as an ONNX model: a graph of about a hundred nodes that ONNX Runtime runs.

    jaxgpt-export onnx --artifact ART --out FOLDER --precision float32|int8-dynamic|int8-weight-only|...

graph.py says what is computed, session.py how it is run fast; check.py holds what was written to the probe.
"""
