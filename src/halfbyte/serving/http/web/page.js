"use strict";
// Text is only ever put into a page as text; nothing is fetched but from this server.
const sides = ["left", "right"];
const talks = { left: [], right: [] }; // what each side was told and has said
let running = null; // an AbortController while answers come

async function connect() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.status === 401) {
      $("key-row").hidden = false;
      $("fold").open = true;
      state("a key is needed", "bad");
      return;
    }
    if (!response.ok) throw new Error(await problem(response));
    const models = (await response.json()).data;
    const base = models.find((model) => !model.parent) || models[0];
    const first = models.find((model) => model.parent) || base;
    for (const side of sides) {
      const select = $(side);
      select.replaceChildren();
      for (const model of models) select.add(new Option(model.parent ? model.id : model.id + " (base)", model.id));
      if (side === "right") select.add(new Option("nothing", ""));
      select.value = side === "left" ? first.id : first === base ? "" : base.id;
    }
    $("most").max = base.max_model_len;
    state("ready", "ready");
  } catch (error) {
    state(String(error.message || error), "bad");
  }
}

// JSON is shown indented, bare or in a fence; anything else as it is.
function show(text, said) {
  const inner = said.trim().replace(/^```(?:json)?\n([^]*)\n```$/, "$1");
  text.textContent = said;
  text.classList.toggle("json", /^\s*(```json\n\s*)?[{[]/.test(said));
  try {
    const value = JSON.parse(inner);
    if (value !== null && typeof value === "object") text.textContent = JSON.stringify(value, null, 2);
  } catch { /* it is prose, or not whole */ }
}

async function answer(side, model, box, signal) {
  box.replaceChildren();
  const name = put(box, "p", "name");
  put(name, "b", "", model);
  const figures = put(name, "span", "", "");
  const text = put(box, "p", "text", "");
  const most = Math.max(1, Number($("most").value) || 256);
  let said = "";
  const system = $("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...talks[side]];
  const body = {
    model, messages, stream: true, stream_options: { include_usage: true },
    temperature: Number($("temperature").value) || 0, max_tokens: most,
  };
  const began = performance.now();
  box.classList.add("busy");
  try {
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
    if (!response.ok) throw new Error(await problem(response));
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) figures.textContent = chunk.usage.completion_tokens + " tokens, " + ((performance.now() - began) / 1000).toFixed(1) + " s";
      const choice = chunk.choices && chunk.choices[0];
      if (!choice) continue;
      const near = $("talk").scrollHeight - $("talk").scrollTop - $("talk").clientHeight < 80;
      said += choice.delta.content || "";
      show(text, said);
      if (choice.finish_reason === "length")
        put(box, "p", "cut", "Cut here, at its limit: the longest answer is " + most + " tokens, or the model's context is full.");
      if (near) $("talk").scrollTop = $("talk").scrollHeight;
    }
  } catch (error) {
    if (signal.aborted) figures.textContent = "stopped";
    else put(box, "p", "error", String(error.message || error));
  } finally {
    box.classList.remove("busy");
    if (box.isConnected) talks[side].push({ role: "assistant", content: said });
    const buttons = put(box, "p", "tools");
    put(buttons, "button", "copy", "Copy").addEventListener("click", (event) => copy(event.target, box.querySelector(".text")));
    put(buttons, "button", "again", "Again").addEventListener("click", () => again(side, model, box));
    for (const button of buttons.children) button.type = "button";
  }
}

// Answers that are waited for together; Stop ends them all.
async function wait(begin) {
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  await Promise.all(begin(running.signal));
  running = null;
  $("send").disabled = false;
  $("stop").disabled = true;
}

function again(side, model, box) {
  if (running) return;
  talks[side].pop(); // its answer; the question stays
  wait((signal) => [answer(side, model, box, signal)]);
}

async function ask() {
  const question = $("ask").value.trim();
  if (!question || running) return;
  $("ask").value = "";
  $("empty").hidden = true;
  const turn = put($("talk"), "section", "turn");
  put(turn, "p", "asked", question);
  const pair = put(turn, "div", "pair");
  const asked = sides.filter((side) => $(side).value);
  if (asked.length === 1) pair.classList.add("single");
  const boxes = asked.map((side) => put(pair, "article", "answer " + side));
  turn.scrollIntoView({ block: "end" });
  await wait((signal) => asked.map((side, n) => {
    talks[side].push({ role: "user", content: question });
    return answer(side, $(side).value, boxes[n], signal);
  }));
  $("ask").focus();
}

function clear() {
  if (running) running.abort();
  for (const side of sides) talks[side].length = 0;
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  $("empty").hidden = false;
  $("ask").focus();
}

$("back").hidden = !location.pathname.startsWith("/ask/"); // below a studio, which keeps the key
if (!$("back").hidden) $("key").value = localStorage.getItem("key") || "";
$("form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && running) running.abort(); });
$("stop").addEventListener("click", () => running && running.abort());
$("clear").addEventListener("click", clear);
$("key").addEventListener("change", connect);
for (const side of sides) $(side).addEventListener("change", () => {
  talks[side].length = 0;
  for (const old of document.querySelectorAll("." + side + " .again")) old.remove();
});
const narrow = matchMedia("(max-width: 640px)"); // there settings are folded
const fold = () => { $("fold").open = !narrow.matches; };
narrow.addEventListener("change", fold);
fold();
connect();
