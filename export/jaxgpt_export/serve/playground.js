/* Of playground.html: asks /v1/models what there is, streams from /v1/completions, and shows what comes.
   What a model writes is text (textContent), never HTML. */

const ALTERNATIVES = 5;  // that are shown of a token, beside itself
const LEVELS = [[0.5, "p0"], [0.2, "p1"], [0.05, "p2"], [0.01, "p3"], [0, "p4"]];  // probability: class
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const SAMPLING = NUMBERS.slice(0, 4);  // how tokens are drawn

const $ = (id) => document.getElementById(id);
let models = [];    // of /v1/models
let panels = [];    // one a chosen model
let running = null; // AbortController of what runs
let again = null;   // timer that asks again for models that load

// ---- the server ----

async function ask(path, body, signal) {
  const headers = {"Content-Type": "application/json"};
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const options = body ? {method: "POST", body: JSON.stringify(body)} : {};
  let answer;
  try {
    answer = await fetch(path, {...options, headers, signal});
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Error("the server does not answer; does it still run?");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) {
    $("key-field").hidden = false;
    $("key").focus();
  }
  const told = await answer.json().catch(() => null);
  const error = new Error(told?.error?.message ?? `${answer.status} ${answer.statusText}`);
  throw Object.assign(error, {code: told?.error?.code});
}

/** Yield the events of a stream of server-sent events, as lists: what one read brought. */
async function* readEvents(answer, signal) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", ended = false;
  for (;;) {
    const {done, value} = await reader.read().catch((error) => {
      if (signal.aborted) throw error;
      return {done: true};  // the connection broke
    });
    if (done && ended) return;
    if (done) throw new Error("the answer broke off; does the server still run?");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    const data = parts.map((part) => part.replace(/^data: /, ""));
    ended ||= data.includes("[DONE]");
    yield data.filter((part) => part !== "[DONE]").map((part) => JSON.parse(part));
  }
}

async function loadModels() {
  let found;
  try {
    found = (await (await ask("/v1/models")).json()).data;
  } catch (error) {
    if (models.length) return;  // another call has them
    if (error.code !== "loading") return say("", error.message);
    clearTimeout(again);
    again = setTimeout(loadModels, 500);
    return say(`${error.message} …`);
  }
  clearTimeout(again);
  if (models.length) return;
  models = found;
  const names = models.map((model) => model.id);
  $("first").replaceChildren(...names.map((name) => new Option(name)));
  $("second").replaceChildren(new Option("none", ""), ...names.map((name) => new Option(name)));
  $("second").value = names[1] ?? "";
  fillSampling();
  showPanels();
  say("Ready. Models run one after the other, each with the whole processor.");
}

/** Set how tokens are drawn to what the first model says; else to what stands in playground.html. */
function fillSampling() {
  const said = models.find((model) => model.id === $("first").value)?.generation_config ?? {};
  for (const name of SAMPLING) $(name).value = said[name] ?? $(name).defaultValue;
}

// ---- a run ----

function readSettings() {
  const body = {prompt: $("prompt").value, stream: true, stream_options: {include_usage: true}};
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
  body.seed ??= crypto.getRandomValues(new Uint32Array(1))[0];  // one for both models
  const unescape = (line) => line.replace(/\\n/g, "\n").replace(/\\t/g, "\t");
  body.stop = $("stops").value.split("\n").filter(Boolean).map(unescape);
  body.echo = $("echo").checked;
  if ($("logprobs").checked) body.logprobs = ALTERNATIVES;
  return body;
}

/** Let each model continue the prompt, one after the other: each then has the processor to itself. */
async function run() {
  running?.abort();
  const mine = running = new AbortController();
  $("stop").disabled = false;
  try {
    if (!models.length) return await loadModels();
    showPanels();
    const body = readSettings();
    for (const panel of panels) {
      say(`${panel.model.id} writes …`);
      await panel.run(body, mine.signal);
    }
    say("Done.");
  } catch (error) {
    if (running !== mine) return;  // another run has begun
    if (mine.signal.aborted) say("Stopped.");
    else say("", error.message);
  } finally {
    if (running === mine) {
      running = null;
      $("stop").disabled = true;
    }
  }
}

function say(text, error = "") {
  $("status").textContent = text;
  $("status").hidden = !text;
  $("error").textContent = error;
  $("error").hidden = !error;
}

// ---- a model and what it writes ----

class Panel {
  constructor(model) {
    this.model = model;
    this.section = $("panel").content.cloneNode(true).firstElementChild;
    this.find("h2").textContent = model.id;
    this.output = this.find(".output");
    this.output.setAttribute("aria-label", `Text of ${model.id}; arrow keys go from token to token`);
    this.find("ul").replaceChildren(...describe(model).map((line) => element("li", "", line)));
    this.find("details").open = innerWidth > 760;  // as in playground.css: below, panels are one column
    this.tokens = [];  // {name, text, logprob, top, span; end, inside: of its text in the model's}
  }

  find(selector) {
    return this.section.querySelector(selector);
  }

  async run(body, signal) {
    const begin = performance.now();
    const decoder = new TextDecoder();  // of tokens that are parts of characters
    let first = null, last = null, early = 0, tokens = 0, text = "", named = 0, reason = null, usage = null;
    let echo = body.echo;
    const answer = await ask("/v1/completions", {...body, model: this.model.id}, signal);
    for await (const events of readEvents(answer, signal)) {
      const atEnd = this.output.scrollHeight - this.output.scrollTop - this.output.clientHeight < 30;
      for (const event of events) {
        if (event.error) throw new Error(event.error.message);
        usage = event.usage ?? usage;
        for (const choice of event.choices) {
          reason = choice.finish_reason ?? reason;
          const found = tokensOf(choice, decoder);
          if (!echo) {
            text += choice.text;
            tokens += found.length;
            for (const token of found) token.end = named += token.text.length;
          }
          this.add(found, echo);
          echo = false;
        }
      }
      if (tokens && first === null) [first, early] = [performance.now(), tokens];
      if (tokens) last = performance.now();
      this.strike(reason === "length" ? Infinity : text.length);
      if (atEnd) this.output.scrollTop = this.output.scrollHeight;
      markParting();
      const count = usage?.completion_tokens ?? tokens;
      const rate = count > early && last > first ? ((count - early) / (last - first)) * 1000 : null;
      this.showFigures(count, first === null ? null : first - begin, rate, usage, reason);
    }
  }

  add(found, isPrompt) {
    for (const token of found) {
      const probability = token.logprob === null ? 1 : Math.exp(token.logprob);
      const level = LEVELS.find(([least]) => probability >= least)?.[1] ?? "p4";
      token.span = element("span", `token ${level}`, token.text);
      if (isPrompt) token.span.classList.add("prompt");
      if (token.text.startsWith("\n")) token.span.classList.add("line");
      if (token.top) token.span.tabIndex = -1;  // reached with the arrow keys: one stop of Tab a text
      token.span.token = token;
      token.inside = token.text.length;
      this.tokens.push(token);
      this.output.append(token.span);
    }
  }

  /** Strike out what is generated, but not in the text: a stop text, or its beginning while it may be one. */
  strike(textLength) {
    for (const token of this.tokens) {  // of all, as one read may bring any number
      const begin = token.end - token.text.length;
      const inside = Math.max(0, Math.min(textLength - begin, token.text.length));
      if (token.end === undefined || inside === token.inside) continue;
      token.inside = inside;
      token.span.textContent = token.text.slice(0, inside);
      if (inside < token.text.length) token.span.append(element("s", "", token.text.slice(inside)));
    }
  }

  showFigures(tokens, firstMs, rate, usage, reason) {
    const cached = usage?.prompt_tokens_details?.cached_tokens ?? 0;
    const scored = this.tokens.filter((token) => token.logprob !== null && token.end !== undefined);
    const mean = scored.reduce((sum, token) => sum + token.logprob, 0) / scored.length;
    const parts = [
      [rate === null ? "–" : rate.toFixed(0), "tokens/s"],
      [firstMs === null ? "–" : firstMs.toFixed(0), "ms to the first token"],
      [String(tokens), reason === "stop" ? "tokens, then it ended" : "tokens"],
    ];
    if (scored.length) parts.push([signed(mean, 2), "mean log-probability"]);
    if (cached) parts.push([`${cached} of ${usage.prompt_tokens}`, "prompt tokens were cached"]);
    this.find(".figures").replaceChildren(...parts.map(([figure, unit]) => {
      const part = element("span", "", ` ${unit}`);
      part.prepend(element("b", "", figure));
      return part;
    }));
  }
}

/** Return the tokens of an event. Without log-probabilities a piece of text stands for one. */
function tokensOf(choice, decoder) {
  const told = choice.logprobs;
  if (!told) return choice.text ? [{name: choice.text, text: choice.text, logprob: null, top: null}] : [];
  return told.tokens.map((name, i) => {
    const bytes = /^bytes:((\\x[0-9a-f]{2})+)$/.exec(name);
    const content = bytes && Uint8Array.from(bytes[1].slice(2).split("\\x"), (hex) => parseInt(hex, 16));
    const text = content ? decoder.decode(content, {stream: true}) : decoder.decode() + name;
    return {name, text, logprob: told.token_logprobs[i], top: told.top_logprobs[i]};
  });
}

function showPanels() {
  const chosen = [$("first").value, $("second").value].filter(Boolean);
  panels = chosen.map((name) => new Panel(models.find((model) => model.id === name)));
  $("panels").replaceChildren(...panels.map((panel) => panel.section));
  $("parting").hidden = $("popup").hidden = true;
}

/** Mark the first token at which the second model writes another one than the first. */
function markParting() {
  const [a, b] = panels.map((panel) => panel.tokens.filter((token) => token.end !== undefined));
  if (!b?.length || document.querySelector(".token.part")) return;
  const place = b.findIndex((token, i) => token.name !== a[i]?.name);
  const [ours, theirs] = [a[place], b[place]];
  if (place >= 0) for (const token of [ours, theirs]) token?.span.classList.add("part");
  const wrote = (token) => (token ? JSON.stringify(token.name) : "nothing more");
  $("parting").hidden = false;
  $("parting").textContent = place < 0
    ? `The first ${b.length} tokens are the same.`
    : `The models part at token ${place + 1}: ${panels[0].model.id} writes ${wrote(ours)}, ` +
      `${panels[1].model.id} ${wrote(theirs)}. What follows continues two texts.`;
}

// ---- what is known of a model ----

function describe(model) {
  const {method, engine, max_model_len: length} = model;
  const lines = [`${method}, computed by ${engine}; prompt and text have up to ${length} tokens.`];
  const c = model.certificate;
  if (!c) return [...lines, "It has no certificate: nothing was measured."];
  const percent = (value) => `${(100 * value).toFixed(2).replace(/\.?0+$/, "")} %`;
  if (c.step != null) lines.push(`Trained for ${c.step.toLocaleString("en")} steps.`);
  if (c.quantized_loss !== undefined) {
    lines.push(`Loss on ${c.tokens.toLocaleString("en")} held-out tokens: ${signed(c.quantized_loss, 4)}; ` +
      `${signed(c.float_loss, 4)} before it was quantized (change ${signed(c.loss_increase, 4)}).`);
  }
  if (c.top1_agreement !== undefined) {
    lines.push(`On its test positions the most probable token is that of the trained model in ` +
      `${percent(c.top1_agreement)}; a logit is off by ${c.max_abs_logit_diff.toPrecision(2)} at most, the ` +
      `probabilities by a mean KL divergence of ${c.kl_mean.toPrecision(2)} nats.`);
  }
  if (model.sha256) lines.push(`SHA-256 of the weights: ${model.sha256}`);
  return lines;
}

// ---- alternatives of a token ----

function showAlternatives(span) {
  const {name, top} = span.token;
  const table = element("table");
  for (const [other, logprob] of Object.entries(top).sort((x, y) => y[1] - x[1])) {
    const row = table.insertRow();
    row.className = other === name ? "chosen" : "";
    const cells = [JSON.stringify(other), percentOf(logprob), signed(logprob, 2)];
    if (other === name) cells.push("written");
    for (const text of cells) row.insertCell().textContent = text;
  }
  const popup = $("popup");
  popup.replaceChildren(element("small", "", "token, probability, its logarithm"), table);
  popup.hidden = false;
  document.querySelector("[aria-describedby=popup]")?.removeAttribute("aria-describedby");
  span.setAttribute("aria-describedby", "popup");
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const above = box.bottom + 8 + popup.offsetHeight > innerHeight;
  popup.style.left = `${Math.max(8, Math.min(box.left, innerWidth - popup.offsetWidth - 8))}px`;
  popup.style.top = `${Math.max(8, above ? box.top - popup.offsetHeight - 8 : box.bottom + 8)}px`;
}

function percentOf(logprob) {
  const percent = 100 * Math.exp(logprob);
  return `${percent < 0.01 ? percent.toExponential(0) : percent.toPrecision(3)} %`;
}

function signed(value, digits) {
  return value.toFixed(digits).replace("-", "−");
}

function element(tag, className = "", text = "") {
  return Object.assign(document.createElement(tag), {className, textContent: text});
}

// ---- keys and pointer ----

const tokenAt = (event) => (event.target.closest ? event.target.closest(".token[tabindex]") : null);
const hide = () => { $("popup").hidden = true; };

for (const kind of ["mouseover", "focusin"]) {
  $("panels").addEventListener(kind, (event) => tokenAt(event) && showAlternatives(tokenAt(event)));
}
$("panels").addEventListener("mouseout", hide);
$("panels").addEventListener("focusout", hide);
addEventListener("scroll", () => {
  if ($("popup").hidden) return;  // Escape hid it
  if (document.activeElement.token) showAlternatives(document.activeElement);
  else hide();
}, true);
$("panels").addEventListener("keydown", (event) => {
  const output = event.target.closest(".output");
  if (!output || !["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
  const spans = [...output.querySelectorAll(".token[tabindex]")];
  const place = spans.indexOf(event.target);
  const places = {ArrowLeft: Math.max(place - 1, 0), ArrowRight: place + 1, Home: 0, End: spans.length - 1};
  spans[Math.min(places[event.key], spans.length - 1)]?.focus();
  event.preventDefault();
});
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape") {
    hide();
    running?.abort();
  }
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("stop").addEventListener("click", () => running?.abort());
$("key").addEventListener("change", () => models.length || loadModels());
$("first").addEventListener("change", fillSampling);
for (const id of ["first", "second"]) $(id).addEventListener("change", () => {
  running?.abort();
  showPanels();
});
loadModels();
