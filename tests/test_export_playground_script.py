"""The playground's script, run by node with a page of stand-ins: answers that come in odd ways."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
JS = (ROOT / "export" / "jaxgpt_export" / "serve" / "playground.js").read_text("utf-8")
SECONDS = 60  # that node takes at most, on a busy machine
# What the script needs of a browser. A test answers what was asked for, and sees which timers are set.
PAGE = r"""
class Stand {
  constructor() {
    Object.assign(this, {children: [], found: {}, heard: {}, style: {}, value: "", defaultValue: ""});
    Object.assign(this, {className: "", hidden: false, scrollHeight: 0, scrollTop: 0, clientHeight: 0});
    this.classList = {add: (name) => { this.className += ` ${name}`; }};
  }
  get textContent() { return this.children.map((child) => child.textContent ?? child).join(""); }
  set textContent(text) { this.children = [text]; }
  get content() { return {cloneNode: () => ({firstElementChild: new Stand()})}; }
  querySelector(selector) { return this.found[selector] ??= new Stand(); }
  append(child) { this.children.push(child); }
  prepend(child) { this.children.unshift(child); }
  replaceChildren(...children) { this.children = children; }
  addEventListener(kind, listener) { this.heard[kind] = listener; }
  insertRow() { return this.insertCell(); }
  insertCell() { this.append(new Stand()); return this.children.at(-1); }
  getClientRects() { return [{left: 0, top: 0, bottom: 0}]; }
  setAttribute() {}
  focus() {}
}
const page = new Stand(), ids = {}, asked = [], timers = new Map();
globalThis.document = Object.assign(page, {
  getElementById: (id) => ids[id] ??= new Stand(),
  createElement: () => new Stand(),
  querySelector: () => null,
  activeElement: new Stand(),
});
globalThis.addEventListener = (kind, listener) => page.addEventListener(kind, listener);
globalThis.Option = class { constructor(name) { this.name = name; } };
globalThis.innerWidth = globalThis.innerHeight = 1000;
globalThis.setTimeout = (call) => timers.set(timers.size + 1, call) && timers.size;
globalThis.clearTimeout = (timer) => timers.delete(timer);
globalThis.fetch = (path) => new Promise((resolve) => asked.push({path, resolve}));

const settled = () => new Promise((resolve) => setImmediate(resolve));
const answer = async (request, status, body) => {
  request.resolve(new Response(JSON.stringify(body), {status}));
  for (let i = 0; i < 5; i++) await settled();
};
const model = (id) => ({id, method: "fp32", engine: "e", max_model_len: 9});
const tell = (value) => console.log(JSON.stringify(value));
"""


def told_by(test: str) -> list[Any]:
    """What a test in JavaScript tells, which follows the script in the same module."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node")
    call = [node, "--input-type=module"]
    done = subprocess.run(
        call, input=PAGE + JS + test, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_held_token_is_shown_whole_however_many_tokens_one_read_brings() -> None:
    first, struck, last = told_by("""
        const panel = new Panel(model("a"));
        const token = () => ({text: "xy", logprob: null});
        const add = (count) => panel.add(Array.from({length: count}, token), false);
        const left = () => panel.tokens.filter((token) => token.span.children.length > 1).length;
        const end = () => panel.tokens.forEach((token, i) => { token.end = 2 * i + 2; });
        add(3), end(), panel.strike(1), tell(left());
        tell(panel.tokens[0].span.children.map((child) => child.textContent ?? child));
        add(100), end(), panel.strike(206), tell(left());
    """)
    assert (first, struck, last) == (3, ["x", "y"], 0)


def test_models_that_load_are_asked_for_by_one_timer_and_taken_once() -> None:
    timers_set, selected, kept, timers_left, status = told_by("""
        const loading = {error: {code: "loading", message: "they load"}};
        run(), run();  // while the script's own first request goes on
        for (const request of asked.splice(0)) await answer(request, 503, loading);
        tell(timers.size);
        run(), run();
        const [first, second] = asked.splice(0);
        await answer(first, 200, {data: [model("a"), model("b")]});
        const [panel] = panels;
        tell($("second").value);
        $("second").value = "";  // as a user chooses
        await answer(second, 200, {data: [model("a"), model("b")]});
        tell([$("second").value, panels[0] === panel]);
        tell(timers.size);
        loadModels();
        await answer(asked.pop(), 503, loading);
        tell([$("status").textContent.slice(0, 6), timers.size]);
    """)
    assert timers_set == 1
    assert (selected, kept) == ("b", ["", True])
    assert (timers_left, status) == (0, ["Ready.", 0])


def test_an_answer_that_breaks_off_is_told_and_no_other_is() -> None:
    broke_off = "the answer broke off; does the server still run?"
    expected = {
        "whole": ["Done.", ""],
        "whole, then a broken connection": ["Done.", ""],
        "closed": ["", broke_off],
        "closed within an event": ["", broke_off],
        "closed before any": ["", broke_off],
        "a broken connection": ["", broke_off],
        "an error of the model": ["", "it failed"],
        "stopped by the user": ["Stopped.", ""],
    }
    told = told_by("""
        await answer(asked.pop(), 200, {data: [model("a")]});
        $("first").value = "a";
        const text = 'data: {"choices": [{"text": "x", "finish_reason": null}]}\\n\\n';
        const failed = 'data: {"error": {"message": "it failed"}}\\n\\n';
        const done = "data: [DONE]\\n\\n";
        const broken = new TypeError("network error");
        const stop = () => { running.abort(); return running.signal.reason; };
        for (const [how, parts, end] of [
          ["whole", [text, done]],
          ["whole, then a broken connection", [text, done], () => broken],
          ["closed", [text, text]],
          ["closed within an event", [text, text.slice(0, 20)]],
          ["closed before any", []],
          ["a broken connection", [text], () => broken],
          ["an error of the model", [text, failed]],
          ["stopped by the user", [text], stop],
        ]) {
          const over = run();
          let body;
          asked.pop().resolve(new Response(new ReadableStream({start(controller) { body = controller; }})));
          for (const part of parts) body.enqueue(new TextEncoder().encode(part));
          for (let i = 0; i < 20; i++) await settled();
          if (end) body.error(end());
          else body.close();
          await over;
          tell([how, $("status").textContent, $("error").textContent]);
        }
    """)
    assert {how: said for how, *said in told} == expected


def test_scrolling_moves_the_alternatives_that_are_shown_and_shows_none_again() -> None:
    hidden = told_by("""
        const span = new Stand();
        span.token = {name: "x", top: {x: -0.1}};
        const moved = () => { page.heard.scroll(); tell($("popup").hidden); };
        document.activeElement = span;
        showAlternatives(span), moved();
        page.heard.keydown({key: "Escape"}), moved();
        showAlternatives(span), document.activeElement = new Stand(), moved();
    """)
    assert hidden == [False, True, True]
