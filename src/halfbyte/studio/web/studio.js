"use strict";
// Files in the server's folder are the only state: what is shown is asked for anew after a reload.
const powers = (low, high) => Array.from({ length: high - low + 1 }, (_, n) => 2 ** (low + n));
const SETTINGS = [ // field, words, choices of a slider or a list; none: text
  ["lora.r", "rank of the adapter", powers(0, 8)],
  ["train.per_device_train_batch_size", "rows a step", powers(0, 6)],
  ["data.rows", "how many of the rows; all", null],
  ["train.num_train_epochs", "passes over the rows", [0.25, 0.5, 1, 2, 3, 4, 5, 6, 8, 10]],
  ["data.max_length", "context: tokens of the longest row", powers(6, 15)],
  ["train.within", "or a time for all of it, such as 30m", null],
  ["train.learning_rate", "learning rate", null],
  ["quant.type", "number format", ["auto", "nf4", "fp4", "int8", "none", "gguf"]],
  ["data.mask", "what is trained", ["completion", "assistant", "all"]],
  ["data.eval", "held out: auto, none, 5% or a file's name", null],
];
const CHARTS = [["Loss", "nats a trained token", "loss"], ["Learning rate", "", "learning_rate"], ["Gradient norm", "before clipping", "grad_norm"], ["Speed", "tokens/s", "tokens_per_second"], ["Memory", "GB", "rss_bytes"]];
const ROLES = { prompt: "asks", completion: "answers", instruction: "asks", input: "is beside it", output: "answers", text: "holds the text", label: "holds the label", messages: "holds the messages", conversations: "holds the conversation", query: "is searched with", passage: "is to be found", chosen: "holds the better answer", rejected: "holds the worse answer" };
const FORMATS = { auto: ["prompt", "completion"], prompt_completion: ["prompt", "completion"], messages: ["messages"], sharegpt: ["conversations"], alpaca: ["instruction", "input", "output"], text: ["text"], labels: ["text", "label"], vectors: ["query", "passage"], preference: ["prompt", "chosen", "rejected"] };
const OF_KIND = { classify: "labels", embed: "vectors" }; // the format that a preset reads
const GGUF = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "F16", "BF16"];
let now = { data: [], recipes: [], runs: [], jobs: [], bases: [], names: [], presets: [], changed: {}, folder: "" };
let recipe = "", run = "", curves = {}, told = {}, drawn = 0, whole = 0, later = 0, listening = null, checking = 0, asking = 0, lost = false, shownAt = 0, gguf = GGUF[0], stored = [];

// -------------------------------------------------------------------------------------------------- the server
async function call(method, path, body) {
  const response = await fetch("api/" + path, { method, headers: headers(), body: body === undefined ? undefined : JSON.stringify(body) });
  return read(response);
}

async function read(response) {
  if (response.status === 401) needKey();
  if (response.ok) return response.json();
  const error = (await response.json().catch(() => ({}))).error || {};
  throw new Error((error.message || "HTTP " + response.status) + (error.param ? "\nfix: " + error.param : ""));
}

function needKey() {
  $("key-row").hidden = false;
  state("a key is needed", "bad");
}

function tell(error) {
  $("problem").hidden = !error;
  $("problem").textContent = error ? String(error.message || error) : "";
}

const ask = (...words) => call("POST", "commands", { words });
const typed = (words) => "halfbyte " + words.map((word) => (/^[\w.+@/=:-]+$/.test(word) ? word : "'" + word + "'")).join(" ");

function free(taken, stem, suffix) { // a name that is not there yet
  let name = stem + suffix;
  for (let n = 2; taken.includes(name); n++) name = stem + "-" + n + suffix;
  return name;
}

const attempt = (work) => async (event) => {
  if (event && event.preventDefault) event.preventDefault();
  tell("");
  try { await work(event); } catch (error) { tell(error); }
};

async function listen() {
  if (listening) listening.abort();
  const mine = listening = new AbortController();
  const job = run ? jobOf(run) : null;
  const asked = new URLSearchParams({ ...(run && now.runs.some((r) => r.run === run) ? { run } : {}), ...(job ? { job: job.id } : {}) });
  const subject = asked.toString();
  listening.subject = subject;
  try {
    const response = await fetch("api/events?" + asked, { headers: headers(), signal: mine.signal });
    if (response.status === 401) return needKey();
    if (!response.ok) throw new Error();
    state("connected", "ready");
    if (lost) again();
    for await (const data of events(response)) {
      const news = JSON.parse(data);
      if (news.curves) curves = {};
      if (news.rows) grow(news.rows);
      draw(news);
    }
  } catch (error) { // the server has gone, or another subject is asked for
    if (!mine.signal.aborted && !/fetch|network/i.test(error.message)) console.error(error);
  }
  if (mine.signal.aborted) return;
  lost = true;
  state("not connected; trying again", "bad");
  setTimeout(() => mine === listening && listen(), 1000);
}

// The server is there again: what was asked of it meanwhile is asked once more.
const again = attempt(async () => {
  lost = false;
  if (recipe) await openRecipe(recipe);
});

// -------------------------------------------------------------------------------------------------- what is there
function stateIs(value) {
  now = value;
  $("folder").textContent = "in " + now.folder;
  $("where").textContent = "in " + now.folder;
  showBases();
  options($("rows"), ["", ...now.data], "choose", recipe ? undefined : $("rows").value || chosen.rows);
  if (!recipe && $("rows").value && $("columns").dataset.of !== $("rows").value) showColumns($("rows").value, chosen.fields);
  options($("kind"), ["", ...now.presets], "any task", recipe ? undefined : $("kind").value || chosen.kind);
  options($("recipe"), ["", ...now.recipes], "a new one", recipe);
  if (recipe && now.changed[recipe] > shownAt && $("pending").hidden) attempt(() => openRecipe(recipe))(); // by another tab, or an editor
  const going = now.jobs.find((job) => job.state === "running" && job.words[0] === "train" && job.words[1] === "recipes/" + recipe);
  $("going").textContent = going ? "it is being trained: see Runs" : "it goes on without this page";
  listRuns();
  listJobs();
  if (run) showRun();
}

function showBases() {
  const bases = [...new Set([...now.bases, ...stored])];
  if ($("bases").children.length !== bases.length) $("bases").replaceChildren(...bases.map((name) => new Option(name, name)));
}

function options(select, names, none, chosen) {
  const value = chosen === undefined ? select.value : chosen;
  if (select.options.length !== names.length || [...select.options].map((o) => o.value).join() !== names.join()) {
    select.replaceChildren(...names.map((name) => new Option(name || none, name)));
  }
  if (names.includes(value)) select.value = value;
}

const jobOf = (name) => now.jobs.find((job) => job.words.includes("runs/" + name));
const fixed = (value) => (typeof value === "number" ? value.toFixed(4) : "");
const gb = (bytes) => (bytes / 1e9).toFixed(2) + " GB";
const time = (s) => (s < 10 ? +s.toPrecision(2) + " s" : s < 90 ? Math.round(s) + " s" : s < 5400 ? Math.round(s / 60) + " min" : (s / 3600).toFixed(1) + " h");

function listRuns() {
  const text = JSON.stringify(now.runs), at = document.activeElement;
  if ($("run-rows").dataset.of === text || $("runs").hidden) return;
  $("run-rows").dataset.of = text;
  const chosen = new Set(picked()), focused = $("run-rows").contains(at) ? [at.tagName, at.value || at.hash] : null;
  $("run-rows").replaceChildren(...now.runs.map((one) => {
    const row = document.createElement("tr");
    const box = put(put(row, "td", ""), "input", "");
    box.type = "checkbox";
    box.value = one.run;
    box.checked = chosen.has(one.run);
    box.setAttribute("aria-label", "compare " + one.run);
    put(put(row, "td", ""), "a", "", one.run).href = "#run/" + one.run;
    put(put(row, "td", ""), "span", "state " + one.state.replace(" ", "-"), one.state);
    put(row, "td", "n", one.step + (one.steps ? " of " + one.steps : ""));
    put(row, "td", "n", fixed(one.loss));
    put(row, "td", "n", fixed(one.eval_loss));
    put(row, "td", "", one.model);
    return row;
  }));
  if (focused) [...$("run-rows").querySelectorAll("input, a")].find((e) => e.tagName === focused[0] && (e.value || e.hash) === focused[1])?.focus();
  $("no-runs").hidden = now.runs.length > 0;
  $("compare").disabled = picked().length < 2;
}

const picked = () => [...document.querySelectorAll("#run-rows input:checked")].map((box) => box.value);

function commandBox(parent, text) {
  const box = put(parent, "div", "command");
  const pre = put(box, "pre", "", text);
  pre.tabIndex = 0;
  const button = put(box, "button", "", "Copy");
  button.type = "button";
  button.addEventListener("click", () => copy(button, pre));
}

function listJobs() {
  const text = JSON.stringify(now.jobs);
  if ($("jobs").dataset.of === text) return;
  $("jobs").dataset.of = text;
  $("jobs").replaceChildren();
  if (!now.jobs.length) put($("jobs"), "p", "note", "There are none yet.");
  for (const job of now.jobs) {
    const row = put($("jobs"), "article", "answer");
    commandBox(row, job.command);
    const line = put(row, "p", "grip");
    put(line, "span", "state " + ({ done: "finished", failed: "crashed", running: "running" }[job.state] || ""), job.state);
    put(line, "span", "note", new Date(job.began * 1000).toLocaleString());
    if (job.state === "running") stopButton(line, job);
    if (job.port) put(line, "a", "button", "Ask").href = "ask/" + job.id + "/";
  }
}

function stopButton(parent, job) {
  const button = put(parent, "button", "", "Stop");
  button.type = "button";
  button.addEventListener("click", attempt(() => call("POST", "jobs/" + job.id + "/stop")));
}

// -------------------------------------------------------------------------------------------------- a new adapter
async function drop(files) {
  const file = files[0];
  if (!file) return;
  const at = location.hash;
  $("upload").textContent = "taking " + file.name;
  // As the server has names: letters and digits of any script, then a few signs; of signs alone it is "rows".
  const name = file.name.normalize().replace(/[^\p{L}\p{N}_.+@ -]/gu, "-")
    .replace(/^[^\p{L}\p{N}_]*(?=\.\w+(\.gz)?$)/u, "rows").replace(/^[^\p{L}\p{N}_]+/u, "");
  const response = await fetch("api/data/" + encodeURIComponent(name), { method: "PUT", headers: headers(), body: file });
  const taken = await read(response).then((answer) => answer.name).catch((error) => {
    $("upload").textContent = "";
    throw error;
  });
  $("upload").textContent = taken + " is in data/";
  now.data.unshift(taken);
  if (location.hash !== at) return options($("rows"), ["", ...new Set(now.data)], "choose"); // the user is elsewhere by now
  leaveRecipe();
  options($("rows"), ["", ...new Set(now.data)], "choose", taken);
  await begin(taken);
}

// What is chosen before there is a recipe, kept for a reload of this tab.
const chosen = JSON.parse(sessionStorage.getItem("chosen") || "{}");
function keep(values) {
  sessionStorage.setItem("chosen", JSON.stringify(Object.assign(chosen, values)));
}

const shape = () => OF_KIND[$("kind").value] || $("format").value || "auto";
const columnsChosen = () => Object.fromEntries([...$("columns").querySelectorAll("select")].filter((s) => s.value).map((s) => [s.name, s.value]));

async function showColumns(rows, fields) {
  const mine = ++asking;
  $("columns").dataset.of = rows;
  const columns = rows ? (await call("GET", "data/" + encodeURIComponent(rows)).catch(() => ({ columns: [] }))).columns : [];
  if (mine !== asking) return; // asked anew meanwhile, or of no rows any more
  $("columns").hidden = !columns.length;
  $("columns").replaceChildren(...FORMATS[shape()].map((role) => {
    const label = document.createElement("label");
    label.textContent = "the column that " + ROLES[role] + " ";
    const select = put(label, "select", "");
    select.name = role;
    options(select, ["", ...columns], "told by its name", (fields || {})[role]);
    select.addEventListener("change", attempt(readAs));
    return label;
  }));
}

async function readAs() { // another format, other columns: of the recipe, or of the one that is to be begun
  if (recipe) return change("data.fields", Object.keys(columnsChosen()).length ? columnsChosen() : null);
  keep({ format: $("format").value, fields: columnsChosen() });
  const open = [...$("columns").querySelectorAll("select")].filter((s) => !s.value && s.name !== "input" && ![...s.options].some((o) => o.value === s.name));
  if ($("rows").value && !open.length) await begin($("rows").value);
}

async function begin(rows) {
  pending(true);
  keep({ base: $("base").value.trim(), rows, kind: $("kind").value, format: $("format").value, fields: columnsChosen() });
  try {
    const name = free(now.recipes, rows.replace(/\..*/, ""), ".yaml");
    const words = ["init", "recipes/" + name, "--model=" + chosen.base, "--data=data/" + rows];
    if (chosen.kind) words.push("--for=" + chosen.kind);
    if (chosen.format && chosen.format !== "auto") words.push("--set=data.format=" + chosen.format);
    for (const [role, column] of Object.entries(chosen.fields)) words.push("--set=data.fields." + role + "=" + JSON.stringify(column));
    const begun = await ask(...words, "--json").catch(async (error) => {
      $("draft").hidden = true;
      await showColumns(rows, chosen.fields);
      throw error;
    });
    keep({ rows: "", fields: {}, format: "" });
    $("draft").hidden = false;
    showPlan(begun.plan, begun.remarks);
    location.hash = "new/" + name;
  } finally {
    pending(false);
  }
}

function leaveRecipe() { // rows are chosen anew: columns of other rows are not theirs
  recipe = "";
  asking++;
  history.replaceState(null, "", "#new");
  $("columns").replaceChildren();
  $("columns").hidden = true;
}

function pending(on) {
  $("pending").hidden = !on;
  $("plan").classList.toggle("stale", on);
}

async function openRecipe(name) {
  recipe = name;
  $("draft").hidden = !name;
  options($("recipe"), ["", ...new Set([...now.recipes, ...(name ? [name] : [])])], "a new one", name);
  if (name) await showRecipe(await call("GET", "recipes/" + name));
  if (name) await check();
}

async function showRecipe(value) {
  shownAt = value.changed;
  const form = $("settings-of"), of = (field) => field.split(".").reduce((section, key) => (section || {})[key], value.values);
  const train = of("data.train"), file = Array.isArray(train) ? train[0].path || train[0] : train;
  value.values.data.rows = Array.isArray(train) ? train[0].limit : undefined;
  $("base").value = value.values.model || "";
  options($("rows"), ["", ...now.data], "choose", String(file).replace("data/", ""));
  for (const [field, words, choices] of SETTINGS) {
    const given = of(field), slides = choices && typeof choices[0] === "number";
    let input = form.elements[field];
    if (!input) {
      const label = put(form, "label", "", words + " ");
      if (slides) put(label, "output", "").id = "out-" + field;
      input = put(label, choices && !slides ? "select" : "input", "");
      input.name = field;
      if (slides) Object.assign(input, { type: "range", min: 0, max: choices.length - 1, step: 1 });
      else if (choices) input.append(...choices.map((choice) => new Option(choice, choice)));
      else Object.assign(input, { autocomplete: "off", placeholder: field === "data.eval" ? "auto" : "" });
      input.addEventListener("input", () => { if (slides) said(input, choices[input.value]); });
      input.addEventListener("change", attempt(() => change(field, slides ? choices[input.value] : input.value)));
    }
    if (document.activeElement === input && !slides) continue;
    if (slides) {
      const at = choices.findIndex((choice) => choice >= given);
      input.value = at < 0 ? choices.length - 1 : at;
      said(input, given);
    } else input.value = given === undefined || given === null ? "" : given;
  }
  $("kind").value = Object.keys(OF_KIND).find((kind) => kind === value.values.task) || "";
  $("format").value = FORMATS[of("data.format")] ? of("data.format") : "auto";
  await showColumns(String(file).replace("data/", ""), of("data.fields"));
  $("typed").replaceChildren();
  for (const words of [["data", "check"], ["train"]]) commandBox($("typed"), typed([...words, "recipes/" + recipe]));
  $("text").replaceChildren();
  commandBox($("text"), value.text);
}

function said(input, value) {
  $("out-" + input.name).textContent = value === undefined ? "as it is" : value;
  input.setAttribute("aria-valuetext", String(value));
}

async function change(field, given) {
  const text = typeof given === "string" ? given.trim() : given;
  const value = text === "" ? null : typeof text === "string" && text !== "" && !isNaN(text) && field !== "data.eval" ? Number(text) : text;
  const values = { [field]: value };
  if (field === "lora.r") values["lora.lora_alpha"] = 2 * value; // the usual scale
  try {
    await showRecipe(await call("PATCH", "recipes/" + recipe, values));
  } catch (error) {
    document.activeElement.blur();
    await showRecipe(await call("GET", "recipes/" + recipe));
    throw error;
  }
  await check();
}

async function check() {
  const mine = ++checking, name = recipe;
  pending(true);
  try {
    const checked = await ask("data", "check", "recipes/" + name, "--json", "--row", String(Number($("row").value) || 1));
    if (mine !== checking) return;
    showPlan(checked.plan, [...checked.within, ...checked.notices]);
    $("start").disabled = checked.refused || checked.plan.short_bytes > 0;
    $("row").max = checked.train.used;
    showRows(checked.rows);
    $("gates").replaceChildren();
    for (const gate of checked.gates) {
      const line = put($("gates"), "li", "");
      put(line, "b", gate.level === "ok" ? "" : "error", gate.level);
      put(line, "span", "", " " + gate.gate + ": " + gate.found + (gate.fix ? "; " + gate.fix : ""));
    }
    const most = Math.max(1, ...checked.histogram.map((part) => part.rows));
    $("lengths").replaceChildren();
    for (const part of checked.histogram) {
      put($("lengths"), "span", "n", part.least + " to " + part.most + " tokens");
      put(put($("lengths"), "span", "bar"), "i", "").style.width = (100 * part.rows / most).toFixed(1) + "%";
      put($("lengths"), "span", "n", part.rows);
    }
    tell("");
  } catch (error) {
    if (mine === checking) throw error;
  } finally {
    if (mine === checking) pending(false);
  }
}

function showPlan(plan, remarks) {
  const box = $("plan");
  box.replaceChildren();
  if (plan) {
    const seconds = plan.time.step_s * plan.time.steps + Object.values(plan.time.around).reduce((a, b) => a + b, 0);
    const disk = plan.disk.reduce((sum, line) => sum + line.bytes, 0);
    const list = put(box, "dl", "facts");
    for (const [name, value, id] of [["memory, at most", gb(plan.peak_bytes) + " of " + gb(plan.available_bytes) + " free", "memory"], ["time", "about " + time(seconds), "seconds"], ["disk", gb(disk), "disk"], ["steps", plan.time.steps.toLocaleString() + ", each " + time(plan.time.step_s), "steps"]]) {
      const part = put(list, "div", "");
      put(part, "dt", "", name);
      put(part, "dd", "", value).dataset.of = id;
    }
    const whole = Math.max(plan.available_bytes, plan.peak_bytes), stack = put(box, "div", "stack");
    stack.setAttribute("role", "img");
    stack.setAttribute("aria-label", plan.memory_line);
    for (const line of plan.lines) {
      const part = put(stack, "i", line.where);
      part.style.width = (100 * line.bytes / whole).toFixed(2) + "%";
      part.title = line.name + " " + gb(line.bytes);
    }
    if (plan.short_bytes) put(box, "p", "error", gb(plan.short_bytes) + " are missing. " + plan.fixes.slice(0, 3).map((fix) => fix.setting + ": " + fix.change).join("; "));
    for (const text of plan.warnings) put(box, "p", "note", text);
    const lines = put(box, "details", "");
    put(lines, "summary", "", "line by line");
    const scroll = put(lines, "div", "scroll"), table = put(put(scroll, "table", ""), "tbody", "");
    scroll.tabIndex = 0;
    for (const line of [...plan.lines, ...plan.host_lines, ...plan.disk]) {
      const row = put(table, "tr", "");
      put(row, "th", "", line.name + (line.where === "disk" ? " (disk)" : "")).scope = "row";
      put(row, "td", "n", gb(line.bytes));
      put(row, "td", "", line.how);
    }
  }
  for (const text of remarks || []) put(box, "p", "note", text);
}

function showRows(rows) {
  $("examples").replaceChildren();
  for (const row of rows) {
    put($("examples"), "p", "label", "row " + row.row + " (" + row.where + "): " + row.tokens + " tokens, " + row.labelled + " trained");
    const text = put($("examples"), "pre", "row");
    text.tabIndex = 0;
    for (const piece of row.pieces) {
      const part = piece.weight !== 1, span = put(text, "span", "piece" + (piece.labelled ? " on" : "") + (piece.special ? " special" : "") + (part ? " part" : ""), piece.text);
      if (part) span.title = "counts × " + piece.weight;
    }
  }
}

// -------------------------------------------------------------------------------------------------- a run
function showRun() {
  const one = now.runs.find((r) => r.run === run), job = jobOf(run);
  $("run-name").replaceChildren(run + " ");
  if (one) put($("run-name"), "span", "state " + one.state.replace(" ", "-"), one.state);
  $("run-why").textContent = one ? one.model + ", step " + one.step + (one.steps ? " of " + one.steps : "") + (one.why ? ": " + one.why : "") : "its folder is not there yet";
  const running = job && job.state === "running", talking = now.jobs.find((j) => j.port && j.words.includes("runs/" + run));
  const trains = (one && one.state === "running") || (running && job.words[0] === "train");
  const finished = one && ["finished", "worse", "diverged"].includes(one.state);
  const wanted = JSON.stringify([trains, running && job.id, finished, one && one.state, talking && talking.id]);
  if ($("actions").dataset.of !== run + wanted) {
    $("actions").dataset.of = run + wanted;
    $("actions").replaceChildren();
    $("words").replaceChildren();
    const action = (label, words, kind, work) => {
      if (words) commandBox($("words"), typed(words));
      const button = put($("actions"), "button", kind || "", label);
      button.type = "button";
      button.addEventListener("click", attempt(work || (async () => { await call("POST", "jobs", { words }); listen(); })));
    };
    const name = "runs/" + run;
    if (running) stopButton($("actions"), job);
    if (one && !trains && !finished) action("Go on", ["train", name, "--resume"], "primary");
    if (finished) {
      action("Score", ["eval", name, "--base"]);
      if (talking) put($("actions"), "a", "button primary", "Ask base and adapter").href = "ask/" + talking.id + "/";
      else action("Ask", ["serve", name, "--port", "0"]);
      action("Merge", ["merge", name]);
      action("Export GGUF", ["export", name, "--gguf", gguf, "--ollama"]);
      const format = put(put($("actions"), "label", "note", "GGUF as "), "select", "");
      format.append(...GGUF.map((name) => new Option(name, name, name === gguf, name === gguf)));
      format.addEventListener("change", () => { gguf = format.value; $("actions").dataset.of = ""; showRun(); $("actions").querySelector("select").focus(); });
      action("Export adapter", ["export", name, "--peft"]);
      action("Verify", ["verify", name]);
    }
    if (one) put($("actions"), "a", "button", "Report").href = "#report/" + run;
    if (one && !trains) action("Delete", null, "danger", () => remove("runs", run, "#runs"));
    $("their-words").hidden = !$("words").children.length;
  }
  const followed = new URLSearchParams(listening ? listening.subject : "");
  if ((job && followed.get("job") !== job.id) || (one && followed.get("run") !== run)) listen();
}

function jobIs(job) {
  const box = $("job");
  if (box.dataset.id !== job.id) {
    box.replaceChildren();
    box.dataset.id = job.id;
    commandBox(box, job.command);
    put(box, "p", "note");
    put(box, "pre", "log").tabIndex = 0;
  }
  box.querySelector(".note").textContent = job.state + (job.code ? " with exit code " + job.code : "");
  const log = box.querySelector(".log"), end = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  const more = job.log.startsWith(log.textContent) ? job.log.slice(log.textContent.length) : null;
  if (more === null) log.textContent = job.log;
  else if (more) log.append(more);
  if (end && more !== "") log.scrollTop = log.scrollHeight;
  $("result").textContent = job.state === "running" ? "" : job.words[0] + " " + job.state;
}

async function remove(kind, name, then) {
  $("sure-what").textContent = "Delete " + kind + "/" + name + "? It cannot be had back.";
  $("sure").returnValue = "no";
  $("sure").showModal();
  await new Promise((closed) => $("sure").addEventListener("close", closed, { once: true }));
  if ($("sure").returnValue !== "yes") return;
  await call("DELETE", kind + "/" + name, { confirm: name });
  location.hash = then;
}

function grow(rows) {
  for (const row of rows)
    for (const [name, value] of Object.entries(row)) {
      if (name === "step" || typeof value !== "number") continue;
      const line = (curves[name] = curves[name] || [[], []]);
      if (line[0].length && line[0][line[0].length - 1] >= row.step) continue;
      line[0].push(row.step);
      line[1].push(name === "rss_bytes" ? value / 1e9 : value);
    }
}

// All that the server tells at once (every 0.7 s at most) is drawn in one frame, as the run may need these cores. A page
// that nobody sees draws nothing.
function draw(news) {
  Object.assign(told, news);
  if (drawn || document.hidden || !Object.keys(told).length) return;
  drawn = requestAnimationFrame(() => {
    const news = told;
    told = {};
    drawn = 0;
    if (news.state) stateIs(news.state);
    if (news.job) jobIs(news.job);
    if (news.curves || news.rows) charts();
  });
}

function charts() { // the loss each time, the others every six seconds
  const all = CHARTS.filter(([, , name]) => curves[name]), at = performance.now();
  const few = all.length && at - whole < 6000 && $("charts").children.length === all.length;
  clearTimeout(later);
  if (few) later = setTimeout(() => { whole = 0; draw({ rows: [] }); }, 6000);
  else whole = at;
  const shown = all.slice(0, few ? 1 : undefined).map(([title, unit, name]) => {
    const lines = [["each step", name === "loss" ? "raw" : "smooth", ...curves[name]]];
    if (name === "loss" && curves.loss[1].length > 8) lines.push(["smoothed", "smooth", curves.loss[0], smooth(curves.loss[1])]);
    if (name === "loss" && curves.eval_loss) lines.push(["held-out rows", "eval", ...curves.eval_loss]);
    return chart(title, unit, lines);
  });
  few ? $("charts").firstChild.replaceWith(...shown) : $("charts").replaceChildren(...shown);
}

function smooth(values) {
  const keep = 1 - 2 / (Math.max(3, values.length / 25) + 1);
  let mean = 0, weight = 0;
  return values.map((v) => {
    if (v === null) return null;
    mean = keep * mean + (1 - keep) * v;
    weight = keep * weight + (1 - keep);
    return mean / weight;
  });
}

// A chart as a report has it, so that tip.js reads it.
function chart(title, unit, lines) {
  const W = 520, H = 240, L = 54, R = 12, T = 44, B = 30, NS = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(NS, "svg"), figure = document.createElement("figure");
  const add = (tag, attributes, text) => {
    const node = document.createElementNS(NS, tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    svg.append(node);
    return node;
  };
  const xs = lines.flatMap((l) => l[2]), ys = lines.flatMap((l) => l[3]).filter((y) => y !== null);
  const range = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  let [xl, xh] = range(xs), [yl, yh] = range(ys);
  if (xl === xh) xh = xl + 1;
  const edge = Math.max((yh - yl) * 0.06, Math.abs(yh) * (yl === yh ? 0.05 : 0.005)) || 1; // so labels have room
  yl = yl >= 0 && yl < 0.15 * yh ? 0 : yl - edge;
  yh += edge;
  const x = (v) => L + ((v - xl) / (xh - xl)) * (W - L - R), y = (v) => H - B - ((v - yl) / (yh - yl)) * (H - B - T);
  const last = lines.map((l) => l[0] + " " + number(l[3][l[3].length - 1] ?? NaN)).join(", ");
  for (const [key, value] of Object.entries({ class: "chart", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title + ": " + last, "data-xl": xl, "data-xh": xh, "data-yl": yl, "data-yh": yh, "data-xs": L, "data-xe": W - R, "data-ys": H - B, "data-ye": T, "data-log": 0, "data-unit": "step" })) svg.setAttribute(key, value);
  add("text", { x: 4, y: 14, class: "title" }, title + (unit ? ", " + unit : ""));
  add("text", { x: 4, y: 32, class: "tick" }, last);
  const ticks = (low, high) => { const raw = (high - low) / 4, p = 10 ** Math.floor(Math.log10(raw)), s = [1, 2, 5, 10].find((m) => m * p >= raw) * p; return Array.from({ length: 6 }, (_, n) => (Math.ceil(low / s) + n) * s).filter((v) => v <= high); };
  const power = (v) => Math.floor(Math.log10(Math.abs(v) || 1)), least = power((yh - yl) / 4); // ticks are multiples of 10 ** least
  for (const v of ticks(yl, yh)) {
    add("path", { class: "grid", d: `M${L} ${y(v)}H${W - R}` });
    add("text", { x: L - 6, y: y(v) + 4, class: "tick end" }, number(v, 1 + power(v) - least));
  }
  for (const v of ticks(xl, xh)) if (v % 1 === 0) add("text", { x: x(v), y: H - 10, class: "tick mid" }, v);
  add("path", { class: "axis", d: `M${L} ${T}V${H - B}H${W - R}` });
  for (const [name, kind, px, py] of lines) {
    const every = Math.max(1, Math.floor(px.length / 600)); // of many points the lowest and highest of each few are drawn
    let d = "", gap = true;
    for (let n = 0; n < px.length; n += every) {
      const part = py.slice(n, n + every);
      for (const v of every === 1 ? part : [Math.min(...part.filter((p) => p !== null)), Math.max(...part.filter((p) => p !== null))]) {
        if (v === null || !isFinite(v)) { gap = true; continue; }
        d += (gap ? "M" : "L") + x(px[n]).toFixed(1) + " " + y(v).toFixed(1);
        gap = false;
      }
    }
    add("path", { class: (px.length === 1 ? "dots " : "line ") + kind, d: px.length === 1 ? d + "h0" : d, "data-name": name });
  }
  figure.append(svg);
  return figure;
}

// -------------------------------------------------------------------------------------------------- pages
async function report(names) {
  $("report").replaceChildren();
  put($("report"), "p", "note", "making it");
  const words = [names.length > 1 ? "compare" : "report", ...names.map((name) => "runs/" + name)];
  await ask(...words);
  const response = await fetch("api/page" + (names.length > 1 ? "" : "?run=" + encodeURIComponent(names[0])), { headers: headers() });
  if (!response.ok) await read(response);
  const page = new DOMParser().parseFromString(await response.text(), "text/html").querySelector("main");
  $("report").replaceChildren();
  commandBox($("report"), typed(words));
  $("report").append(...page.childNodes);
}

const go = attempt(async () => {
  const [page, ...names] = decodeURIComponent(location.hash.slice(1)).split("/");
  const section = page === "report" ? "shown" : document.querySelector("section[data-page]#" + (/^\w+$/.test(page) ? page : "new")) ? page || "new" : "new";
  for (const each of document.querySelectorAll("section[data-page]")) each.hidden = each.id !== section;
  for (const link of document.querySelectorAll("nav a")) {
    const here = link.hash === "#" + section || (link.hash === "#runs" && ["run", "shown"].includes(section));
    here ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  const before = run;
  run = section === "run" ? names[0] || "" : "";
  if (run !== before) {
    curves = {};
    $("charts").replaceChildren();
    $("job").replaceChildren();
    $("job").dataset.id = $("actions").dataset.of = $("result").textContent = "";
    listen();
  }
  if (run) showRun();
  if (section === "runs") listRuns();
  if (section === "shown") await report(names);
  if (section === "new" && (names[0] || "") !== recipe) await openRecipe(names[0] || "");
});

const given = new URLSearchParams(location.hash.slice(1)).get("key");
if (given) {
  localStorage.setItem("key", given);
  history.replaceState(null, "", location.pathname);
}
for (const name of Object.keys(FORMATS)) $("format").append(new Option(name === "auto" ? "told from its columns" : name, name));
if (chosen.base) $("base").value = chosen.base;
$("key").value = localStorage.getItem("key") || "";
$("key").addEventListener("change", () => { localStorage.setItem("key", $("key").value); location.reload(); });
$("file").addEventListener("change", attempt(() => drop($("file").files)));
for (const [type, over] of [["dragover", true], ["dragleave", false], ["drop", false]])
  $("drop").addEventListener(type, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", over);
    if (type === "drop") attempt(() => drop(event.dataTransfer.files))();
  });
$("base").addEventListener("change", () => keep({ base: $("base").value.trim() }));
$("rows").addEventListener("change", attempt(() => { leaveRecipe(); return $("rows").value && begin($("rows").value); }));
$("kind").addEventListener("change", attempt(() => { const rows = $("rows").value; keep({ kind: $("kind").value }); leaveRecipe(); return rows && begin(rows); }));
$("format").addEventListener("change", attempt(async () => {
  keep({ format: $("format").value });
  if (recipe) return change("data.format", $("format").value);
  await showColumns($("rows").value, {});
  if ($("rows").value) await begin($("rows").value);
}));
$("recipe").addEventListener("change", () => { location.hash = "new" + ($("recipe").value ? "/" + $("recipe").value : ""); });
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); document.querySelector("section[data-page]:not([hidden])").focus(); });
$("settings-of").addEventListener("submit", (event) => event.preventDefault());
$("row").addEventListener("change", attempt(check));
for (const [id, by] of [["back-row", -1], ["next-row", 1]])
  $(id).addEventListener("click", attempt(() => { $("row").value = Math.min(Math.max(1, Number($("row").value) + by), Number($("row").max) || 1); return check(); }));
$("start").addEventListener("click", attempt(async () => {
  $("start").disabled = true; // a second click is a second run
  try { await start(); } catch (error) { $("start").disabled = false; throw error; }
}));
async function start() {
  const taken = [...now.names, ...now.jobs.flatMap((job) => job.words.map((word) => word.replace("runs/", "")))];
  const name = free(taken, recipe.replace(/\.yaml$/, ""), "");
  now.jobs.unshift(await call("POST", "jobs", { words: ["train", "recipes/" + recipe, "--output", "runs/" + name] }));
  location.hash = "run/" + name;
}
$("run-rows").addEventListener("change", () => { $("compare").disabled = picked().length < 2; });
$("compare").addEventListener("click", () => { location.hash = "report/" + picked().map(encodeURIComponent).join("/"); });
addEventListener("hashchange", go);
document.addEventListener("visibilitychange", () => draw());
listen();
go();
ask("store", "list", "--json").then((found) => { // bases that are quantised here already, by their names on the hub
  stored = found.entries.map((entry) => (entry.source || {}).id || "").filter((name) => /^\w[\w.-]*\/[\w.-]+$/.test(name));
  showBases();
}).catch(() => {});
