"use strict";

// Two halves that know nothing of each other: the conversation, and the picture of the machine.

const at = (id) => document.getElementById(id);
const headers = () => {
  const key = at("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
};

// ---- the conversation

const turns = [];
let answering = null; // the AbortController of the answer that is being written
let model = null;

function say(role, text) {
  const item = document.createElement("li");
  item.className = role;
  item.append(document.createTextNode(text));
  at("messages").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue; // a comment: it is still at work
      const data = part.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer(item) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    signal: answering.signal,
    body: JSON.stringify({
      model,
      messages: turns,
      stream: true,
      stream_options: { include_usage: true },
      temperature: Number(at("temperature").value),
      max_completion_tokens: Number(at("max-tokens").value) || null,
    }),
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  const began = performance.now();
  let first = null;
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const piece = event.choices[0]?.delta?.content;
    if (piece) {
      first ??= performance.now();
      item.firstChild.data += piece;
      item.scrollIntoView({ block: "end" });
    }
    if (event.usage) {
      const seconds = (performance.now() - (first ?? began)) / 1000;
      const note = document.createElement("small");
      const tokens = event.usage.completion_tokens;
      note.textContent = `${tokens} tokens, ${(tokens / Math.max(seconds, 0.001)).toFixed(1)} a second`;
      item.append(note);
    }
  }
}

async function ask(text) {
  turns.push({ role: "user", content: text });
  say("user", text);
  const item = say("assistant", "");
  answering = new AbortController();
  at("send").hidden = true;
  at("stop").hidden = false;
  try {
    await answer(item);
  } catch (error) {
    if (error.name !== "AbortError") {
      item.classList.add("wrong");
      item.append(document.createTextNode(error.message));
    }
  }
  const said = item.firstChild.data;
  if (said) turns.push({ role: "assistant", content: said });
  else turns.pop(); // nothing was answered: ask again
  answering = null;
  at("send").hidden = false;
  at("stop").hidden = true;
  at("prompt").focus();
}

const stop = () => answering?.abort();

function begin() {
  stop();
  turns.length = 0;
  at("messages").replaceChildren();
  at("prompt").focus();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("prompt").value.trim();
  if (!text || answering || !model) return;
  at("prompt").value = "";
  ask(text);
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.altKey && event.key.toLowerCase() === "n") begin();
});
at("stop").addEventListener("click", stop);
at("new").addEventListener("click", begin);

// ---- the machine

const EVERY_MS = 1000;
const reads = []; // bytes a second, of the last two minutes
let before = null;

function bytes(count) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (count >= size) return `${(count / size).toFixed(count >= 10 * size ? 0 : 1)} ${unit}`;
  }
  return `${Math.round(count)} B`;
}

function bar(id, parts, whole) {
  at(id).replaceChildren(
    ...parts.map(({ size, colour, name }) => {
      const piece = document.createElement("i");
      piece.style.width = `${Math.min(100, (100 * size) / Math.max(whole, 1e-12))}%`;
      piece.style.background = `var(--${colour})`;
      piece.title = name;
      return piece;
    }),
  );
}

function legend(id, parts) {
  at(id).replaceChildren(
    ...parts.map(({ colour, label }) => {
      const item = document.createElement("li");
      const dot = document.createElement("i");
      dot.style.background = `var(--${colour})`;
      item.append(dot, label);
      return item;
    }),
  );
}

function showMemory(memory) {
  const names = { base: "a", dense: "b", kv: "c", scratch: "d", cache: "e" };
  const parts = Object.entries(names).map(([name, colour]) => ({
    name, colour, size: memory[name], label: `${name} ${bytes(memory[name])}`,
  }));
  bar("memory", parts, memory.promised);
  legend("memory-legend", parts);
  at("memory-text").textContent = `${bytes(memory.resident)} of ${bytes(memory.promised)} promised`;
}

function showExperts({ slots, all, held }, { hits, misses }) {
  const colours = { full: "a", compressed: "e", "sign-mantissa": "b", exponents: "c" };
  const parts = Object.entries(colours)
    .map(([name, colour]) => ({ name, colour, size: held[name], label: `${held[name]} ${name}` }))
    .filter(({ size }) => size);
  bar("experts", parts, all);
  legend("experts-legend", parts);
  const hit = hits + misses ? `, ${((100 * hits) / (hits + misses)).toFixed(0)} % found there` : "";
  at("experts-text").textContent = `room for ${slots} of ${all}${hit}`;
}

function showTime(spent, seconds) {
  const tokens = spent.tokens - before.tokens;
  const part = (key) => Math.max(0, spent[key] - before[key]);
  const known = part("wait") + part("decode") + part("multiply");
  const parts = [
    { name: "waiting for the drive", colour: "c", size: part("wait") },
    { name: "decoding", colour: "b", size: part("decode") },
    { name: "multiplying", colour: "a", size: part("multiply") },
    { name: "the rest", colour: "f", size: Math.max(0, part("wall") - known) },
  ].map((one) => ({ ...one, label: one.name }));
  const read = spent.bytes_read - before.bytes_read;
  reads.push(read / seconds);
  if (reads.length > 120) reads.shift();
  const most = Math.max(...reads, 1);
  at("read").firstElementChild.setAttribute(
    "points", reads.map((rate, x) => `${x},${29 - (28 * rate) / most}`).join(" "));
  if (!tokens) {
    at("read-text").textContent = `${bytes(read / seconds)}/s`;
    return;
  }
  bar("time", parts, Math.max(part("wall"), known));
  legend("time-legend", parts);
  at("time-text").textContent = `${((1000 * part("wall")) / tokens).toFixed(1)} ms, ${(tokens / seconds).toFixed(1)} tokens/s`;
  at("read-text").textContent = `${bytes(read / seconds)}/s, ${bytes(read / tokens)} a token`;
}

function showRequests(load, streams) {
  const dots = [];
  for (let n = 0; n < Math.max(streams, load.running) + load.waiting; n++) {
    const dot = document.createElement("i");
    dot.className = n < load.running ? "running" : n < Math.max(streams, load.running) ? "" : "waiting";
    dots.push(dot);
  }
  at("requests").replaceChildren(...dots);
  at("requests-text").textContent = `${load.running} running, ${load.waiting} waiting`;
  bar("kv", [{ size: load.kv_used, colour: "c", name: "in use" }], load.kv_total);
  at("kv-text").textContent = `${bytes(load.kv_used)} of ${bytes(load.kv_total)}`;
}

function show(picture) {
  model = picture.model;
  at("model").textContent = picture.model;
  at("status").textContent = picture.reason ?? picture.status;
  at("status").className = picture.status === "ok" ? "ok" : "wrong";
  at("diagnosis").textContent = picture.diagnosis;
  showMemory(picture.memory);
  showExperts(picture.experts, picture.spent);
  if (before) showTime(picture.spent, (performance.now() - before.at) / 1000);
  before = { ...picture.spent, at: performance.now() };
  showRequests(picture.load, picture.streams);
  const { compute, codec, isa, reader } = picture.engaged;
  at("engaged").textContent = [compute, codec, isa, reader].join(" · ");
}

async function look() {
  try {
    const response = await fetch("machine", { headers: headers() });
    if (response.status === 401) throw new Error("this server asks for a key (Settings)");
    if (!response.ok) throw new Error(`the server answers ${response.status}`);
    show(await response.json());
  } catch (error) {
    at("status").textContent = error instanceof TypeError ? "the server does not answer" : error.message;
    at("status").className = "wrong";
  }
  setTimeout(look, EVERY_MS);
}

look();
