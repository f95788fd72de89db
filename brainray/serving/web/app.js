// The page: scans in, one answer each. It speaks only to the server it came from.

const PARALLEL = 3; // requests at a time
const MAX_TRIES = 8; // of one scan, while the server says that it is busy
const MAX_WAIT_S = 60;
const REQUEST_TIMEOUT_MS = 120_000;
const FORM_BYTES = 2048; // what a form adds to its file, generously
const TOKEN_KEY = "brainray-token";

/** What to say for each reason code of a rejected scan: what it is, and what to do. */
export const REASONS = {
  missing: ["No such file", "There is no file at that place any more. Choose it again."],
  unreadable: ["The file cannot be read", "It was moved, changed or locked since you chose it. Choose it again."],
  empty: ["The file is empty", "It has no bytes at all. Export the image again."],
  truncated: ["The file is cut short", "It ends before its image does, as after a broken copy. Fetch it again."],
  corrupt: ["The file is damaged", "It contradicts its own format. Export the image again."],
  not_an_image: ["This is not an image", "Its bytes are none of JPEG, PNG, BMP, GIF, TIFF or WebP."],
  too_large: ["The image is too large", "It is larger than this server takes. Export it smaller."],
  unsupported: ["This kind of image is not read", "The format, or this variant of it, is not supported. Save it as PNG."],
  multi_frame: ["Several images in one file", "Which one is meant is ambiguous. Export the single slice you mean."],
};

/** What to call a refusal of the server; its own words follow. */
const PROBLEMS = {
  unreachable: "The server cannot be reached",
  unauthorized: "The server asks for a token",
  too_busy: "The server is busy",
  model_unavailable: "The model is not answering",
  timeout: "The answer took too long",
  body_too_slow: "The upload took too long",
  body_too_large: "The file is larger than the server takes",
  internal: "The server failed",
};

const $ = (id) => document.getElementById(id);
const scans = [];
let limits = {};
let classes = [];
let running = 0;
let resumeAt = 0; // no request starts before, for the server asked to wait
let resumeTimer = 0;
let needsToken = false;
let token = sessionStorage.getItem(TOKEN_KEY) ?? "";

// --- words ---------------------------------------------------------------------------------------

const NBSP = "\u00a0";

export function formatShare(share) {
  if (share > 0 && share < 0.0005) return `<${NBSP}0.1${NBSP}%`;
  if (share < 1 && share >= 0.9995) return `>${NBSP}99.9${NBSP}%`;
  return `${(100 * share).toFixed(1)}${NBSP}%`;
}

function formatBytes(count) {
  if (count >= 2 ** 20) return `${(count / 2 ** 20).toFixed(1)}${NBSP}MiB`;
  if (count >= 2 ** 10) return `${Math.round(count / 2 ** 10)}${NBSP}KiB`;
  return `${count}${NBSP}B`;
}

const count = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;

/** Take away what could make a file name look like another, such as a reversed reading order. */
const plain = (name) => name.replace(/[\p{Cc}\p{Cf}]/gu, "\ufffd");

function announce(words) {
  $("announcer").textContent = words;
}

function warn(words) {
  $("alert").textContent = words;
  $("alert").hidden = !words;
}

// --- scans ---------------------------------------------------------------------------------------

function add(files) {
  if (!files.length) return;
  for (const file of files) {
    const scan = { file, state: "waiting", tries: 0, url: null, heatUrl: null };
    scan.card = buildCard(scan);
    scans.push(scan);
    $("cards").append(scan.card.root);
    setState(scan, "waiting");
    preview(scan);
  }
  announce(`${count(files.length, "scan")} added.`);
  refresh();
  pump();
}

function buildCard(scan) {
  const root = $("card").content.firstElementChild.cloneNode(true);
  const card = { root };
  for (const name of ["view", "placeholder", "scan", "heat", "name", "meta", "state", "progress",
    "verdict", "class", "share", "headline", "words", "detail", "probs", "evidence", "drawn", "again"]) {
    card[name] = root.querySelector(`.${name}`);
  }
  const number = scans.length + 1;
  const name = plain(scan.file.name);
  card.name.textContent = name;
  card.name.id = `name-${number}`;
  root.firstElementChild.setAttribute("aria-labelledby", card.name.id);
  card.meta.textContent = formatBytes(scan.file.size);
  card.progress.setAttribute("aria-label", `Progress of ${name}`);
  card.label = card.evidence.querySelector("label");
  card.slider = card.evidence.querySelector("input");
  card.output = card.evidence.querySelector("output");
  card.slider.id = `opacity-${number}`;
  card.label.htmlFor = card.output.htmlFor = card.slider.id;
  card.slider.value = $("opacity-all").value;
  card.slider.addEventListener("input", () => setOpacity(card, card.slider.value));
  card.again.setAttribute("aria-describedby", card.name.id);
  card.again.addEventListener("click", () => {
    scan.tries = 0;
    setState(scan, "waiting");
    card.name.focus(); // the button goes away
    pump();
  });
  return card;
}

/** Find out whether the browser can draw a file, and draw it. */
function preview(scan) {
  const { scan: image, placeholder } = scan.card;
  scan.url = URL.createObjectURL(scan.file);
  scan.drawn = new Promise((resolve) => {
    image.onload = () => resolve(true);
    image.onerror = () => resolve(false);
    image.src = scan.url;
  }).then((can) => {
    if (!can || scan.state === "rejected") return can;
    image.alt = `Scan ${plain(scan.file.name)}`;
    image.hidden = false;
    placeholder.classList.add("gone");
    return can;
  });
}

function setOpacity(card, percent) {
  card.slider.value = percent;
  card.slider.setAttribute("aria-valuetext", `${percent} percent opaque`);
  card.output.textContent = `${percent}${NBSP}%`;
  card.heat.style.opacity = String(percent / 100);
}

function setState(scan, state, words = "") {
  scan.state = state;
  const { card } = scan;
  card.root.dataset.state = state;
  const isOpen = ["waiting", "sending", "computing", "held"].includes(state);
  card.progress.hidden = !isOpen;
  card.root.toggleAttribute("aria-busy", isOpen);
  if (state !== "sending") card.progress.removeAttribute("value");
  if (state === "waiting") card.progress.value = 0;
  const said = { waiting: "Waiting", computing: "Computing…" };
  card.state.textContent = words || said[state] || "";
  card.state.hidden = !card.state.textContent;
  if (isOpen) for (const part of ["headline", "words", "detail", "again"]) card[part].hidden = true;
}

// --- asking --------------------------------------------------------------------------------------

function pump() {
  const now = Date.now();
  if (needsToken) return;
  if (now < resumeAt) {
    clearTimeout(resumeTimer);
    resumeTimer = setTimeout(pump, resumeAt - now);
    return;
  }
  while (running < PARALLEL) {
    const scan = scans.find(({ state }) => state === "waiting" || state === "held");
    if (!scan) return;
    running += 1;
    setState(scan, "sending", "Sending…");
    ask(scan).catch((error) => {
      console.error(error);
      fail(scan, "internal", "The page itself failed. Reload it.");
    }).finally(() => {
      running -= 1;
      refresh();
      pump();
    });
  }
}

async function ask(scan) {
  const most = limits.body_bytes;
  if (most && scan.file.size + FORM_BYTES > most) {
    reject(scan, "too_large", `The file has ${formatBytes(scan.file.size)}; at most ${formatBytes(most)} are taken.`);
    return;
  }
  try {
    await scan.file.slice(0, 1).arrayBuffer();
  } catch {
    reject(scan, "unreadable", "");
    return;
  }
  const render = (await scan.drawn) ? "map" : "overlay";
  if (scan.state === "gone") return;
  const reply = await send(scan, render);
  if (scan.state === "gone") return;
  if (reply.status === 200 && reply.body?.answers?.length === 1) {
    await show(scan, reply.body, render);
  } else if (reply.status === 401) {
    setState(scan, "waiting", "Waiting for the token");
    askToken(reply.token);
  } else if ((reply.status === 429 || reply.status === 503) && scan.tries < MAX_TRIES) {
    hold(scan, reply.retryAfterS);
  } else {
    const problem = reply.body ?? {};
    const words = problem.detail ?? (reply.status
      ? `It answered with status ${reply.status}, and nothing that this page understands.`
      : "Check the connection, or whether it is running.");
    fail(scan, problem.code ?? (reply.status ? "" : "unreachable"), words, problem.title);
  }
}

/** Post one scan; resolves whatever happens, with status 0 where there was no answer. */
function send(scan, render) {
  return new Promise((resolve) => {
    const request = (scan.request = new XMLHttpRequest());
    const used = token;
    const finish = () => {
      let body = null;
      try {
        body = JSON.parse(request.responseText);
      } catch { /* an answer of something in between, such as a proxy */ }
      const retryAfterS = readRetryAfter(request.status ? request.getResponseHeader("retry-after") : null);
      resolve({ status: request.status, body, retryAfterS, token: used });
    };
    request.upload.onprogress = ({ loaded, total, lengthComputable }) => {
      if (scan.state !== "sending" || !lengthComputable) return;
      scan.card.progress.value = loaded / total;
      scan.card.state.textContent = `Sending ${Math.round((100 * loaded) / total)}${NBSP}%`;
    };
    request.upload.onload = () => scan.state === "sending" && setState(scan, "computing");
    request.onload = request.onerror = request.ontimeout = request.onabort = finish;
    request.open("POST", `v1/explain?render=${render}`);
    request.timeout = REQUEST_TIMEOUT_MS;
    request.setRequestHeader("accept", "application/json");
    if (token) request.setRequestHeader("authorization", `Bearer ${token}`);
    const form = new FormData();
    form.append("files", scan.file, scan.file.name);
    request.send(form);
  });
}

export function readRetryAfter(text) {
  const seconds = /^\d+$/.test(text ?? "") ? Number(text) : (Date.parse(text ?? "") - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.min(Math.max(seconds, 0.2), MAX_WAIT_S) : null;
}

/** Put a scan back, and let nothing be sent before the server said. */
function hold(scan, retryAfterS) {
  const waitS = retryAfterS ?? Math.min(2 ** scan.tries, MAX_WAIT_S);
  scan.tries += 1;
  resumeAt = Math.max(resumeAt, Date.now() + 1000 * waitS);
  setState(scan, "held", `The server is busy. Trying again in ${Math.ceil(waitS)}${NBSP}s`);
}

// --- answers -------------------------------------------------------------------------------------

async function show(scan, body, render) {
  const [answer] = body.answers;
  scan.answer = answer;
  scan.classifierId = body.classifier_id;
  scan.answeredAt = new Date().toISOString();
  classes = body.classes ?? classes;
  if (answer.width_px) {
    scan.card.meta.textContent = `${answer.width_px} × ${answer.height_px}${NBSP}px · ${formatBytes(scan.file.size)}`;
  }
  if (answer.status === "rejected") {
    reject(scan, answer.reason, answer.detail);
    return;
  }
  const { card } = scan;
  if (answer.status === "abstained") {
    say(card, "No class is named", answer.detail ?? "The classifier is not sure enough to name one.");
  } else {
    card.class.textContent = answer.predicted_class;
    card.share.textContent = formatShare(answer.confidence);
    card.verdict.hidden = false;
  }
  showProbs(card, answer);
  if (answer.heat_map_png) await showEvidence(scan, answer, render);
  setState(scan, answer.status);
  const name = plain(scan.file.name);
  if (scans.length < 4) {
    announce(answer.status === "abstained"
      ? `${name}: abstained, no class is named.`
      : `${name}: ${answer.predicted_class}, ${formatShare(answer.confidence)}.`);
  }
}

function showProbs(card, answer) {
  card.probs.replaceChildren();
  for (const [name, prob] of Object.entries(answer.probs ?? {})) {
    const row = document.createElement("li");
    const parts = ["prob-name", "prob-bar", "prob-value"].map((kind) => {
      const part = document.createElement("span");
      part.className = kind;
      return part;
    });
    parts[0].textContent = name;
    parts[1].ariaHidden = "true";
    parts[1].style.setProperty("--share", String(prob));
    parts[2].textContent = formatShare(prob);
    row.classList.toggle("top", name === answer.predicted_class);
    row.append(...parts);
    card.probs.append(row);
  }
  card.probs.setAttribute("aria-label", "Probability of each class");
  card.probs.hidden = !card.probs.children.length;
}

async function showEvidence(scan, answer, render) {
  const { card } = scan;
  const bytes = Uint8Array.from(atob(answer.heat_map_png), (c) => c.charCodeAt(0));
  scan.heatUrl = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
  delete answer.heat_map_png; // it is drawn; many scans need not hold it twice
  const what = `Heat map of the evidence for ${answer.explained_class}`;
  const image = render === "map" ? card.heat : card.scan;
  const loaded = new Promise((resolve) => { image.onload = image.onerror = resolve; });
  image.src = scan.heatUrl;
  image.alt = render === "map" ? what : `Scan ${plain(scan.file.name)}. ${what}`;
  image.hidden = false;
  await loaded;
  card.placeholder.classList.add("gone");
  card.drawn.hidden = render === "map";
  card.evidence.hidden = render !== "map";
  card.label.textContent = `Evidence for ${answer.explained_class}`;
  setOpacity(card, card.slider.value);
}

function reject(scan, reason, detail) {
  const { card } = scan;
  scan.answer ??= { status: "rejected", reason, detail };
  scan.answeredAt ??= new Date().toISOString();
  const [headline, words] = REASONS[reason] ?? ["The image cannot be used", ""];
  say(card, headline, words || detail, words ? detail : "");
  card.scan.hidden = true;
  card.placeholder.classList.remove("gone");
  setState(scan, "rejected");
  announce(`${plain(scan.file.name)}: rejected. ${headline}.`);
}

function fail(scan, code, words, title) {
  scan.problem = code || "unknown";
  const headline = PROBLEMS[code] ?? title ?? "The server gave no answer";
  say(scan.card, headline, words);
  scan.card.again.hidden = false;
  setState(scan, "failed");
  announce(`${plain(scan.file.name)}: no answer. ${headline}.`);
}

function say(card, headline, words, detail) {
  for (const [part, text] of Object.entries({ headline, words, detail })) {
    card[part].textContent = text ?? "";
    card[part].hidden = !text;
  }
}

// --- standing ------------------------------------------------------------------------------------

function refresh() {
  const number = (...states) => scans.filter(({ state }) => states.includes(state)).length;
  const settled = number("classified", "abstained", "rejected", "failed");
  $("answers").hidden = !scans.length;
  document.body.classList.toggle("has-scans", scans.length > 0);
  $("cards").classList.toggle("alone", scans.length === 1);
  const parts = ["classified", "abstained", "rejected"]
    .map((state) => [number(state), state]).filter(([n]) => n).map(([n, state]) => `${n} ${state}`);
  const failed = number("failed");
  if (failed) parts.push(`${failed} without an answer`);
  const isDone = settled === scans.length;
  const summary = isDone
    ? `${count(scans.length, "scan")}: ${scans.length === 1 ? parts.join().slice(2) : parts.join(", ")}`
    : `${settled} of ${count(scans.length, "scan")} done`;
  const wasDone = $("overall").hidden;
  $("summary").textContent = summary;
  $("overall").value = scans.length ? settled / scans.length : 0;
  $("overall").hidden = isDone;
  $("download").disabled = !settled;
  $("evidence-all").hidden = scans.filter(({ card }) => !card.evidence.hidden).length < 2;
  $("legend").hidden = scans.every(({ card }) => card.evidence.hidden && card.drawn.hidden);
  if (isDone && !wasDone && scans.length > 1) announce(`Done. ${summary}.`);
}

function clear() {
  for (const scan of scans) {
    setState(scan, "gone");
    scan.request?.abort();
    URL.revokeObjectURL(scan.url);
    if (scan.heatUrl) URL.revokeObjectURL(scan.heatUrl);
  }
  scans.length = 0;
  $("cards").replaceChildren();
  refresh();
  announce("Cleared.");
  $("picker").focus();
}

// --- table ---------------------------------------------------------------------------------------

/** Write a cell of CSV; text that a spreadsheet would compute gets a quote in front. */
export function writeCell(value) {
  if (value === null || value === undefined) return "";
  let text = String(value);
  if (typeof value === "string" && /^[\s\u200b-\u200f\ufeff]*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]/u.test(text)) text = `'${text}`;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** Build the table of answers, with the columns of the bulk job's; a scan without an answer has no status. */
export function buildTable(rows, names) {
  const header = ["scan_uri", "content_sha256", "status", "reason", "predicted_class", "confidence",
    ...names.map((name) => `prob_${name}`), "width_px", "height_px", "classifier_id", "classified_at",
    "size_bytes", "modified_ns"];
  const lines = rows.map(({ file, answer = {}, problem, classifierId, answeredAt }) => [
    file.webkitRelativePath || file.name, answer.content_sha256, answer.status,
    answer.status ? answer.reason : problem, answer.predicted_class, answer.confidence,
    ...names.map((name) => answer.probs?.[name]), answer.width_px, answer.height_px, classifierId,
    answeredAt, file.size, BigInt(file.lastModified) * 1_000_000n,
  ]);
  return [header, ...lines].map((line) => line.map(writeCell).join(",")).join("\r\n") + "\r\n";
}

function download() {
  const settled = scans.filter(({ answer, state }) => answer || state === "failed");
  const text = `\ufeff${buildTable(settled, classes)}`; // the mark tells spreadsheets that it is UTF-8
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
  link.download = `brainray-answers-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  announce(`Downloaded ${count(settled.length, "row")}.`);
}

// --- token ---------------------------------------------------------------------------------------

function askToken(refused) {
  if (refused !== token) { // another one was given meanwhile
    pump();
    return;
  }
  needsToken = true;
  $("docs").hidden = true; // a link carries no token
  const dialog = $("token-dialog");
  if (dialog.open) return;
  $("token-wrong").hidden = !refused;
  $("token").setAttribute("aria-invalid", String(Boolean(refused)));
  $("token").value = "";
  dialog.showModal();
  $("token").focus();
}

function takeToken(event) {
  event.preventDefault();
  token = $("token").value.trim();
  if (!/^[\x21-\x7e]+$/.test(token)) { // a header can carry nothing else
    token = "";
    $("token-wrong").hidden = false;
    return;
  }
  sessionStorage.setItem(TOKEN_KEY, token);
  needsToken = false;
  warn("");
  $("token-dialog").close();
  for (const scan of scans) if (scan.state === "waiting") setState(scan, "waiting");
  describe();
  pump();
}

function refuseToken() {
  $("token-dialog").close();
  warn("Without a token this server answers nothing. Choose a scan to be asked again.");
  for (const scan of scans) {
    if (["waiting", "held"].includes(scan.state)) fail(scan, "unauthorized", "It was not given.");
  }
  needsToken = false;
  refresh();
  $("picker").focus();
}

// --- the classifier ------------------------------------------------------------------------------

async function describe() {
  const state = $("about-state");
  const used = token;
  try {
    const reply = await fetch("v1/model", {
      headers: token ? { authorization: `Bearer ${token}` } : {}, cache: "no-store",
    });
    if (reply.status === 401) {
      state.textContent = "The server asks for a token first.";
      askToken(used);
      return;
    }
    const model = await reply.json();
    if (!reply.ok) throw new Error(model.detail ?? `status ${reply.status}`);
    limits = model.limits ?? {};
    classes = model.classes ?? classes;
    showModel(model);
    state.hidden = true;
  } catch (error) {
    state.textContent = `The server does not say (${error.message}).`;
  }
}

function showModel(model) {
  const facts = [
    ["Classes", model.classes.join(", ")],
    ["Classifier", model.classifier_id],
    ...describeScores(model.metrics),
    ["Input", describeInput(model.preprocessing)],
    ["Computed with", model.runtime?.description],
    ["Intended use", model.intended_use],
    ["Not intended for", model.not_intended_for],
  ].filter(([, value]) => value);
  $("facts").replaceChildren(...facts.map(([name, value]) => {
    const pair = document.createElement("div");
    const [term, words] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    words.textContent = value;
    pair.classList.toggle("wide", value.length > 60);
    pair.append(term, words);
    return pair;
  }));
  $("facts").hidden = false;
  if (limits.body_bytes) {
    $("formats").textContent = `JPEG, PNG, BMP, GIF, TIFF or WebP, up to ${formatBytes(limits.body_bytes).replace(".0", "")} each. They are sent to this server only.`;
  }
}

function describeInput(preprocessing) {
  if (!preprocessing) return "";
  const how = { stretch: "stretched to a square", pad: "padded to a square" }[preprocessing.fit];
  return `${preprocessing.size_px} × ${preprocessing.size_px}${NBSP}px, ${how ?? preprocessing.fit}`;
}

/** Say how right it was on the scans it was judged on; a test set before a validation set. */
function describeScores(metrics) {
  const [split, scores] = Object.entries(metrics ?? {})
    .filter(([, values]) => typeof values?.accuracy === "number")
    .sort(([a], [b]) => (b === "test") - (a === "test"))[0] ?? [];
  if (!split) return [["Measured accuracy", "not known"]];
  const interval = scores.accuracy_ci95;
  const around = interval ? `, 95${NBSP}% interval ${interval.map(formatShare).join(" to ")}` : "";
  const apart = scores.no_twin?.accuracy;
  const twins = typeof apart === "number" ? `; ${formatShare(apart)} on those without a near-twin in training` : "";
  return [["Measured accuracy", `${formatShare(scores.accuracy)} of ${scores.n} ${split} scans${around}${twins}`]];
}

// --- files in ------------------------------------------------------------------------------------

/** Read the files that were dropped, and those in dropped folders, hidden ones left out. */
async function readDropped(transfer) {
  const entries = [...transfer.items].filter(({ kind }) => kind === "file")
    .map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile());
  const files = [];
  const read = async (entry) => {
    if (entry instanceof File) files.push(entry);
    else if (entry?.isFile) files.push(await new Promise((done, no) => entry.file(done, no)));
    else if (entry?.isDirectory) {
      const reader = entry.createReader();
      for (;;) {
        const found = await new Promise((done, no) => reader.readEntries(done, no));
        if (!found.length) break;
        for (const one of found) if (!one.name.startsWith(".")) await read(one);
      }
    }
  };
  for (const entry of entries) await read(entry);
  return files;
}

let depth = 0; // of elements that a drag has entered

const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");

document.addEventListener("dragenter", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  depth += 1;
  document.body.classList.add("dragging");
});
document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
document.addEventListener("dragleave", (event) => {
  if (!hasFiles(event)) return;
  depth = Math.max(0, depth - 1);
  if (!depth) document.body.classList.remove("dragging");
});
document.addEventListener("drop", async (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  depth = 0;
  document.body.classList.remove("dragging");
  try {
    const files = await readDropped(event.dataTransfer);
    warn(files.length ? "" : "There was no file in what you dropped.");
    add(files);
  } catch {
    warn("What you dropped could not be read. Choose the files instead.");
  }
});
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (!files.length || $("token-dialog").open) return;
  event.preventDefault();
  warn("");
  add(files);
});

$("picker").addEventListener("change", () => {
  warn("");
  add([...$("picker").files]);
  $("picker").value = ""; // so that the same file may be chosen again
});
$("opacity-all").addEventListener("input", () => {
  for (const { card } of scans) setOpacity(card, $("opacity-all").value);
});
$("download").addEventListener("click", download);
$("clear").addEventListener("click", clear);
$("token-form").addEventListener("submit", takeToken);
$("token-cancel").addEventListener("click", refuseToken);
$("token-dialog").addEventListener("cancel", (event) => {
  event.preventDefault();
  refuseToken();
});

describe();
