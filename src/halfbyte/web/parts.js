"use strict";
// What a page needs that asks its server. Text is only ever put into a page as text.
const $ = (id) => document.getElementById(id);

function state(text, kind) {
  $("state").textContent = text;
  $("state").className = "state " + (kind || "");
}

function headers() {
  const made = { "Content-Type": "application/json" };
  if ($("key").value) made.Authorization = "Bearer " + $("key").value;
  return made;
}

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return "HTTP " + response.status;
  }
}

function put(parent, tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const blocks = held.split("\n\n");
    held = blocks.pop();
    for (const block of blocks)
      for (const line of block.split("\n")) if (line.startsWith("data: ")) yield line.slice(6);
  }
}

async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text.textContent);
  } catch { // a page that is not https, from another machine
    getSelection().selectAllChildren(text);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}
