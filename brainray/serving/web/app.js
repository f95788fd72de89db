// The page: scans come in, each is asked about, and what was answered stays until it is cleared.
// Pictures are asked about one by one; DICOM and NIfTI files, which belong to series, together.

import { renderCsv } from "./csv.js";
import { gatherDropped, hasFiles, holdsSlices } from "./gather.js";
import { describeLimit, element, renderModel, renderModelCard } from "./model.js";
import { Queue } from "./queue.js";
import { Scan } from "./scan.js";
import { Problem, explainScan, keepToken, readModel, readToken } from "./service.js";
import { Study } from "./study.js";
import { explainProblem, formatBytes, formatCount } from "./words.js";

const PARALLEL = 3;
const MAX_TRIES = 7; // of a scan while the service is busy: about a minute, with the waits between
const MAX_WAIT_S = 60; // longer, and a person decides
const SPEAK_AFTER_MS = 400;
const MOST_SPOKEN = 3; // more answers at once are counted, not read out

const $ = (id) => document.getElementById(id);

let scans = [];
let model = null;
let visit = new AbortController(); // of all that is under way; aborted when the page is cleared
const queue = new Queue((item) => (item instanceof Scan ? answerScan(item) : answerTask(item)), PARALLEL);
const study = new Study({ onExplain: explainSlice, speak: reportWords });

// ---- scans in ----------------------------------------------------------------------------------

async function addFiles(files) {
  if (!files.length) return;
  const { signal } = visit;
  const isOfSeries = await Promise.all(files.map(holdsSlices));
  if (signal.aborted) return;
  const pictures = files.filter((_, at) => !isOfSeries[at]);
  const added = pictures.map((file) => new Scan(file, { onOpen: openViewer, onAgain: retryScans }));
  const batches = study.add(files.filter((_, at) => isOfSeries[at]), model?.limits);
  scans.push(...added);
  $("scans").append(...added.map((scan) => scan.item));
  document.body.classList.add("has-scans");
  $("answers").hidden = false;
  showTally();
  speak(`${formatCount(files.length, "scan")} added.`);
  queue.add([...batches, ...added]);
}

function listenForFiles() {
  for (const input of [$("files"), $("folder")]) {
    input.addEventListener("change", () => {
      addFiles([...input.files].filter(({ name }) => input === $("files") || !name.startsWith(".")));
      input.value = ""; // so that the same file can be chosen again
    });
  }
  document.addEventListener("paste", ({ clipboardData }) => addFiles([...clipboardData.files]));
  let depth = 0; // drags enter a child before they leave its parent
  const veil = (isOver) => { $("veil").hidden = !isOver; };
  document.addEventListener("dragenter", (event) => {
    if (hasFiles(event)) veil(++depth > 0);
  });
  document.addEventListener("dragleave", (event) => {
    if (hasFiles(event)) veil(--depth > 0);
  });
  document.addEventListener("dragover", (event) => {
    if (hasFiles(event)) event.preventDefault();
  });
  document.addEventListener("drop", async (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    depth = 0;
    veil(false);
    addFiles(await gatherDropped(event.dataTransfer));
  });
}

// ---- answers out -------------------------------------------------------------------------------

async function answerScan(scan) {
  const { signal } = visit;
  try {
    await checkFile(scan.file);
    await scan.draw();
    if (signal.aborted) return;
    scan.show("running", "Being answered");
    const { answer, classifierId } = await explainScan(scan.file, scan, signal);
    if (scan.isMisfit(answer)) {
      scan.render = "overlay";
      queue.addFirst(scan);
      return;
    }
    await scan.showAnswer(answer, classifierId);
    if (signal.aborted) return;
    if (model && classifierId !== model.classifier_id) showModel(); // it was replaced meanwhile
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof Problem)) throw error;
    if (postpone(scan, error)) return;
    scan.showProblem(error);
  }
  report(scan);
}

/** Do what a study asks for: answer the files of one request, or put a series together. */
async function answerTask(task) {
  const { signal } = visit;
  try {
    await task.run(signal);
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof Problem)) throw error;
    const parts = task.split(error);
    if (parts) {
      queue.add(parts);
      return;
    }
    if (postpone(task, error)) return;
    task.fail(error);
  }
  if (signal.aborted) return;
  queue.add(study.gather());
  const { total, done } = study.progress;
  reportWords(`${done} of ${formatCount(total, "file")} of series answered.`);
}

/** Ask for the heat map of one slice; null where the page was cleared meanwhile. */
async function explainSlice(file, frame) {
  const { signal } = visit;
  try {
    return await explainScan(file, { frame }, signal);
  } catch (error) {
    if (signal.aborted) return null;
    if (!(error instanceof Problem)) throw error;
    if (error.status === 401) meetRefusal(error);
    return { problem: error };
  }
}

async function checkFile(file) {
  const most = model?.limits?.body_bytes;
  if (most && file.size > most) {
    const detail = `It has ${formatBytes(file.size)}; at most ${formatBytes(most)} are taken.`;
    throw new Problem({ code: "body_too_large", detail });
  }
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw new Problem({ code: "file_unreadable" });
  }
}

/** Put off a scan that may be answered later; say whether it was. */
function postpone(scan, problem) {
  if (problem.status === 401) {
    meetRefusal(problem);
    scan.show("waiting", "Waiting for the token");
    queue.addFirst(scan);
    return true;
  }
  scan.tries += 1;
  const seconds = Math.max(problem.waitSeconds ?? 0, 2 ** (scan.tries - 1));
  if (!problem.mayPass || scan.tries >= MAX_TRIES || seconds > MAX_WAIT_S) return false;
  scan.show("waiting", `The service is busy; trying again in ${Math.max(1, Math.ceil(seconds))} s`);
  queue.pause(seconds);
  queue.addFirst(scan);
  return true;
}

function retryScans(...failed) {
  for (const scan of failed) scan.reset();
  showTally();
  queue.add(failed);
}

function showTally() {
  const done = scans.filter((scan) => scan.isDone);
  const counts = { classified: 0, abstained: 0, rejected: 0, unanswered: 0 };
  const statuses = [...done.flatMap((scan) => scan.statuses), ...study.statuses];
  for (const status of statuses) counts[status] += 1;
  const failed = done.filter((scan) => scan.phase === "failed");
  const { unanswered, ...answered } = counts;
  const parts = Object.entries({ ...answered, "without an answer": failed.length + unanswered })
    .filter(([, number]) => number)
    .map(([word, number]) => `${number.toLocaleString("en")} ${word}`);
  const total = scans.length + study.progress.total;
  const numDone = done.length + study.progress.done;
  const all = numDone === total;
  const numSlices = statuses.length + failed.length;
  $("tally").textContent = [
    all ? formatCount(total, "scan") : `${numDone} of ${formatCount(total, "scan")}`,
    ...(all && numSlices > total ? [formatCount(numSlices, "slice")] : []),
    ...parts,
  ].join(" · ");
  $("progress").max = Math.max(1, total);
  $("progress").value = numDone;
  $("progress").hidden = all;
  $("download").disabled = !numDone;
  $("retry").hidden = failed.length < 2;
  $("retry").textContent = `Try ${failed.length} again`;
}

function clearScans() {
  visit.abort();
  visit = new AbortController();
  queue.clear();
  for (const scan of scans) scan.remove();
  scans = [];
  study.clear();
  unspoken = [];
  $("answers").hidden = true;
  document.body.classList.remove("has-scans");
  speak("Cleared.");
  $("files").focus();
}

function downloadCsv() {
  const classes = new Set(model?.classes ?? []);
  const rows = [...scans.map((scan) => scan.row), ...study.rows];
  for (const { probs } of rows) for (const name of Object.keys(probs ?? {})) classes.add(name);
  const text = renderCsv(rows, [...classes]);
  const link = element("a", "");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
  link.download = "brainray-answers.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  speak("The answers were downloaded.");
}

// ---- what a screen reader says -----------------------------------------------------------------

let unspoken = [];
let speaking = null;

function report(scan) {
  reportWords(`${scan.name}: ${scan.summary}`);
}

function reportWords(words) {
  showTally();
  unspoken.push(words);
  speaking ??= setTimeout(() => {
    speaking = null;
    if (!unspoken.length) return;
    const { total, done } = study.progress;
    const left = scans.filter((one) => !one.isDone).length + total - done;
    const news = unspoken.length > MOST_SPOKEN
      ? `${formatCount(unspoken.length, "more scan")} answered.`
      : unspoken.map((one) => (one.endsWith(".") ? one : `${one}.`)).join(" ");
    speak(left ? `${news} ${left} to go.` : `${news} All done.`);
    unspoken = [];
  }, SPEAK_AFTER_MS);
}

function speak(words) {
  $("live").textContent = words;
}

// ---- the heat map's opacity --------------------------------------------------------------------

function listenForOpacity() {
  const sliders = [$("opacity"), $("viewer-opacity")];
  const apply = (value) => {
    for (const slider of sliders) slider.value = value;
    $("opacity-value").textContent = `${value} %`;
    for (const slider of sliders) slider.setAttribute("aria-valuetext", `${value} %`);
    document.documentElement.style.setProperty("--map-opacity", value / 100);
  };
  for (const slider of sliders) slider.addEventListener("input", () => apply(slider.value));
  apply($("opacity").value);
}

// ---- one scan, large ---------------------------------------------------------------------------

let viewed = null;

function openViewer(scan) {
  viewed = scan;
  showViewed();
  $("viewer").showModal();
}

function showViewed() {
  const { pixels, map } = viewed.pictures;
  $("viewer-name").textContent = viewed.name;
  $("viewer-words").textContent = viewed.isDone ? viewed.summary : "Not answered yet";
  $("viewer-pixels").src = pixels;
  $("viewer-map").hidden = !map;
  $("viewer-blend").hidden = !map;
  if (map) $("viewer-map").src = map;
  $("viewer-previous").disabled = !findNeighbour(-1);
  $("viewer-next").disabled = !findNeighbour(1);
}

function findNeighbour(step) {
  const shown = scans.filter((scan) => scan.pictures);
  return shown[shown.indexOf(viewed) + step];
}

function turn(step) {
  const neighbour = findNeighbour(step);
  if (!neighbour) return;
  viewed = neighbour;
  showViewed();
  speak(`${viewed.name}: ${$("viewer-words").textContent}`);
}

function listenForViewer() {
  $("viewer-close").addEventListener("click", () => $("viewer").close());
  $("viewer-previous").addEventListener("click", () => turn(-1));
  $("viewer-next").addEventListener("click", () => turn(1));
  $("viewer").addEventListener("click", ({ target }) => {
    if (target === $("viewer")) $("viewer").close();
  });
  $("viewer").addEventListener("keydown", ({ key, target }) => {
    if (target.type === "range") return;
    if (key === "ArrowLeft") turn(-1);
    if (key === "ArrowRight") turn(1);
  });
}

// ---- the token ---------------------------------------------------------------------------------

/** Ask for the token, unless that was done since the refused request began. */
function meetRefusal(problem) {
  if (problem.token !== readToken()) return;
  queue.lock();
  if (!$("token-dialog").open) askForToken(problem.token !== null);
}

function askForToken(wasRefused) {
  keepToken(null);
  $("token-button").hidden = false;
  $("token-button").textContent = "Enter token";
  $("token-error").textContent = wasRefused
    ? "The service did not accept the token. Check it, and enter it again." : "";
  $("token").value = "";
  $("token-dialog").showModal();
  $("token").focus();
}

function listenForToken() {
  $("token-button").addEventListener("click", () => {
    if (readToken() === null) {
      askForToken(false);
      return;
    }
    keepToken(null);
    queue.lock();
    $("token-button").textContent = "Enter token";
    speak("The token was forgotten.");
  });
  $("token-cancel").addEventListener("click", () => $("token-dialog").close());
  $("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const token = $("token").value.trim();
    if (!/^[\x21-\x7E]+$/.test(token)) {
      $("token-error").textContent = "A token is one word of plain letters, digits and signs.";
      return;
    }
    useToken(token);
  });
}

function useToken(token) {
  keepToken(token);
  $("token").value = "";
  $("token-dialog").close();
  showTokenKept();
  showModel();
  queue.unlock();
}

function showTokenKept() {
  if (readToken() === null) return;
  $("token-button").hidden = false;
  $("token-button").textContent = "Forget token";
}

// ---- the classifier ----------------------------------------------------------------------------

async function showModel() {
  const card = $("card");
  card.setAttribute("aria-busy", "true");
  try {
    model = await readModel();
    card.replaceChildren(...renderModel(model));
    $("size-limit").textContent = describeLimit(model);
    $("model-card-button").hidden = !model.model_card;
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    showMissingModel(error);
  } finally {
    card.setAttribute("aria-busy", "false");
  }
}

function listenForModelCard() {
  const dialog = $("model-card");
  $("model-card-button").addEventListener("click", () => {
    $("model-card-id").textContent = model.classifier_id;
    $("model-card-text").replaceChildren(...renderModelCard(model.model_card));
    dialog.showModal();
    $("model-card-text").focus(); // the arrow keys scroll it at once
  });
  $("model-card-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", ({ target }) => {
    if (target === dialog) dialog.close();
  });
}

function showMissingModel(problem) {
  if (problem.status === 401) {
    $("card").replaceChildren(element("p", "muted", "Shown once there is a token."));
    meetRefusal(problem);
    if (readToken() !== null) showModel(); // another was entered meanwhile
    return;
  }
  const again = element("button", "", "Ask again");
  again.type = "button";
  again.addEventListener("click", showModel);
  $("card").replaceChildren(element("p", "wrong", explainProblem(problem)), again);
}

// ------------------------------------------------------------------------------------------------

listenForFiles();
listenForOpacity();
listenForViewer();
listenForToken();
listenForModelCard();
$("clear").addEventListener("click", clearScans);
$("download").addEventListener("click", downloadCsv);
$("retry").addEventListener("click", () => {
  $("scans-heading").focus();
  retryScans(...scans.filter((scan) => scan.phase === "failed"));
});
$("left-out-retry").addEventListener("click", () => {
  $("scans-heading").focus();
  queue.add(study.add(study.takeFailed(), model?.limits));
  showTally();
});
showTokenKept();
showModel();
