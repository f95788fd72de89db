// The page: files are queued, sent to the service one by one, and their answers stay until cleared.

import { renderCsv } from "./csv.js";
import { element, makeButton } from "./dom.js";
import { collectDropped, isVolumeFormat } from "./files.js";
import { renderModel } from "./model.js";
import { Queue } from "./queue.js";
import { Scan } from "./scan.js";
import { Series } from "./series.js";
import { Problem, explainFile, readModel, readToken, storeToken } from "./service.js";
import { formatBytes, formatCount } from "./words.js";

const PARALLEL = 3;
const MAX_TRIES = 7; // of a busy service: about a minute, with the waits between
const MAX_WAIT_S = 60; // before a retry; a longer wait counts as a failure
const ANNOUNCE_AFTER_MS = 400;
const MAX_ANNOUNCED = 3; // more answers at once are counted instead

const $ = (id) => document.getElementById(id);

let scans = [];
let series = new Map(); // by the hash of their identifier
let model = null;
let session = new AbortController(); // aborted when the page is cleared
const queue = new Queue(run, PARALLEL);

// ---- files -------------------------------------------------------------------------------------

async function addFiles(files) {
  if (!files.length) return;
  const { signal } = session;
  const areVolumes = await Promise.all(files.map((file) => isVolumeFormat(file).catch(() => false)));
  if (signal.aborted) return;
  const callbacks = { onRetry: retry, onSlices: addToSeries };
  const added = files.map((file, index) => new Scan(file, areVolumes[index], callbacks));
  scans.push(...added);
  $("scans").append(...added.map((scan) => scan.item));
  document.body.classList.add("has-scans");
  $("answers").hidden = false;
  showCounts();
  announce(`${formatCount(files.length, "scan")} added.`);
  queue.add(added);
}

function addToSeries(scan, pictures) {
  const key = scan.answer.series ?? scan.answer.content_sha256;
  if (!series.has(key)) {
    series.set(key, new Series(series.size + 1, explainSlice));
    $("series-list").append(series.get(key).item);
  }
  series.get(key).add(scan, pictures);
}

function listenForFiles() {
  for (const input of [$("files"), $("folder")]) {
    input.addEventListener("change", () => {
      const isFolder = input === $("folder");
      addFiles([...input.files].filter(({ name }) => !isFolder || !name.startsWith(".")));
      input.value = ""; // so that the same file can be chosen again
    });
  }
  document.addEventListener("paste", ({ clipboardData }) => addFiles([...clipboardData.files]));
  const hasFiles = ({ dataTransfer }) => dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    $("drop-overlay").hidden = false;
  });
  document.addEventListener("dragleave", ({ relatedTarget }) => {
    if (!relatedTarget) $("drop-overlay").hidden = true; // the pointer left the window
  });
  document.addEventListener("drop", async (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    $("drop-overlay").hidden = true;
    addFiles(await collectDropped(event.dataTransfer));
  });
}

// ---- answers -----------------------------------------------------------------------------------

/** Get the answer to an item of the queue: a scan, or a series to summarise. */
async function run(item) {
  const { signal } = session;
  try {
    if (item instanceof Scan) await checkFile(item.file);
    await item.run(signal);
    if (signal.aborted) return;
    const { classifierId } = item;
    if (model && classifierId && classifierId !== model.classifier_id) showModel(); // a new one
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof Problem)) throw error;
    if (postpone(item, error)) return;
    item.fail(error);
  }
  report(item);
  if (!scans.every((scan) => scan.isDone)) return;
  const unsummarised = [...series.values()].filter((one) => !one.isSummarised);
  for (const one of unsummarised) one.isSummarised = true;
  queue.add(unsummarised);
}

/** Request the heat map of one slice; return its answer, or the problem. */
async function explainSlice(file, frame) {
  const { signal } = session;
  try {
    return await explainFile(file, { frame }, signal);
  } catch (problem) {
    if (signal.aborted) return {};
    if (!(problem instanceof Problem)) throw problem;
    if (problem.status === 401) handleUnauthorized(problem);
    return { problem };
  }
}

async function checkFile(file) {
  const limit = model?.limits.body_bytes;
  if (limit && file.size > limit) {
    const title = "The file is larger than this service accepts";
    const detail = `It has ${formatBytes(file.size)}; the limit is ${formatBytes(limit)}.`;
    throw new Problem({ code: "body_too_large", title, detail });
  }
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    const title = "The browser cannot read the file. Choose it again.";
    throw new Problem({ code: "file_unreadable", title });
  }
}

/** Put an item back into the queue if a retry may succeed; return whether it was. */
function postpone(item, problem) {
  if (problem.status === 401) {
    handleUnauthorized(problem);
    item.show("waiting", "Waiting for the token");
    queue.putBack(item);
    return true;
  }
  item.numTries += 1;
  const seconds = Math.max(problem.waitSeconds, 2 ** (item.numTries - 1));
  if (!problem.isTemporary || item.numTries >= MAX_TRIES || seconds > MAX_WAIT_S) return false;
  item.show("waiting", `The service is busy; trying again in ${Math.ceil(seconds)} s`);
  queue.putBack(item, seconds);
  return true;
}

function retry(...failed) {
  for (const scan of failed) scan.reset();
  showCounts();
  queue.add(failed);
}

function findFailed() {
  return scans.filter((scan) => scan.phase === "failed");
}

function showCounts() {
  const done = scans.filter((scan) => scan.isDone);
  const statuses = done.flatMap((scan) => scan.rows.map(({ status }) => status));
  const isComplete = done.length === scans.length;
  const total = formatCount(scans.length, "scan");
  const parts = [isComplete ? total : `${done.length} of ${total}`];
  if (isComplete && statuses.length > scans.length) parts.push(formatCount(statuses.length, "slice"));
  for (const status of ["classified", "abstained", "rejected", "unanswered"]) {
    const count = statuses.filter((one) => one === status).length;
    if (count) parts.push(`${count.toLocaleString("en")} ${status}`);
  }
  $("counts").textContent = parts.join(" · ");
  $("progress").max = Math.max(1, scans.length);
  $("progress").value = done.length;
  $("progress").hidden = isComplete;
  $("download").disabled = !done.length;
  const numFailed = findFailed().length;
  $("retry").hidden = numFailed < 2;
  $("retry").textContent = `Try ${numFailed} again`;
}

function clear() {
  session.abort();
  session = new AbortController();
  queue.clear();
  for (const one of [...scans, ...series.values()]) one.remove();
  [scans, series, news] = [[], new Map(), []];
  $("answers").hidden = true;
  document.body.classList.remove("has-scans");
  announce("Cleared.");
  $("files").focus();
}

function downloadCsv() {
  const rows = scans.flatMap((scan) => scan.rows);
  const named = rows.flatMap(({ probs }) => Object.keys(probs ?? {}));
  const text = renderCsv(rows, [...new Set([...model?.classes ?? [], ...named])]);
  const link = element("a", "");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
  link.download = "brainray-answers.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  announce("The answers were downloaded.");
}

// ---- for screen readers --------------------------------------------------------------------------

let news = [];
let announcing = null;

/** Announce an answer, together with others that come at the same time. */
function report({ name, summary }) {
  showCounts();
  news.push(`${name}: ${summary}`.replace(/\.?$/, "."));
  announcing ??= setTimeout(() => {
    announcing = null;
    if (!news.length) return;
    const left = scans.filter((scan) => !scan.isDone).length;
    const text = news.length > MAX_ANNOUNCED
      ? `${formatCount(news.length, "more scan")} answered.` : news.join(" ");
    announce(left ? `${text} ${left} left.` : `${text} All done.`);
    news = [];
  }, ANNOUNCE_AFTER_MS);
}

function announce(text) {
  $("live").textContent = text;
}

// ---- the token ---------------------------------------------------------------------------------

/** Prompt for the token, unless it was entered since the refused request began. */
function handleUnauthorized(problem) {
  if (problem.token !== readToken()) return;
  queue.isLocked = true;
  if (!$("token-dialog").open) promptForToken(problem.token !== null);
}

function promptForToken(wasRefused) {
  setToken(null);
  $("token-error").textContent = wasRefused
    ? "The service did not accept the token. Check it, and enter it again." : "";
  $("token").value = "";
  $("token-dialog").showModal();
}

function setToken(token) {
  storeToken(token);
  $("token-button").hidden = false;
  $("token-button").textContent = token === null ? "Enter token" : "Forget token";
}

function listenForToken() {
  if (readToken() !== null) setToken(readToken());
  $("token-button").addEventListener("click", () => {
    if (readToken() === null) {
      promptForToken(false);
      return;
    }
    queue.isLocked = true;
    setToken(null);
    announce("The token is forgotten.");
  });
  $("token-cancel").addEventListener("click", () => $("token-dialog").close());
  $("token-form").addEventListener("submit", () => { // the browser then closes the dialog
    setToken($("token").value.trim());
    $("token").value = "";
    showModel();
    queue.isLocked = false;
    queue.start();
  });
}

// ---- the classifier ----------------------------------------------------------------------------

async function showModel() {
  const panel = $("model");
  panel.ariaBusy = "true";
  try {
    model = await readModel();
    panel.replaceChildren(...renderModel(model));
    $("size-limit").textContent = `, up to ${formatBytes(model.limits.body_bytes)} each`;
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    if (error.status === 401) {
      panel.replaceChildren(element("p", "muted", "Shown after you enter the token."));
      handleUnauthorized(error);
      if (readToken() !== null) showModel(); // another token was entered meanwhile
      return;
    }
    panel.replaceChildren(element("p", "wrong", error.title), makeButton(showModel, "Try again"));
  } finally {
    panel.ariaBusy = "false";
  }
}

// ------------------------------------------------------------------------------------------------

listenForFiles();
listenForToken();
$("opacity").addEventListener("input", ({ target }) => {
  $("opacity-value").textContent = `${target.value} %`;
  target.setAttribute("aria-valuetext", `${target.value} %`);
  document.documentElement.style.setProperty("--map-opacity", target.value / 100);
});
$("clear").addEventListener("click", clear);
$("download").addEventListener("click", downloadCsv);
$("retry").addEventListener("click", () => {
  $("scans-heading").focus();
  retry(...findFailed());
});
showModel();
