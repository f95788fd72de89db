// One scan on the page: its picture, how far it has come, and its answer.

import { element } from "./model.js";
import { explainProblem, explainStatus, formatShare } from "./words.js";

const template = document.getElementById("scan-template");
let count = 0;

/** A scan, and the list item that shows it. */
export class Scan {
  /** @type {"waiting" | "running" | "answered" | "failed"} */
  phase = "waiting";
  render = "map"; // or "overlay", where the browser cannot draw the scan
  tries = 0;
  answer = null;
  classifierId = null;
  problem = null;
  #urls = [];
  #parts = {};

  constructor(file, { onOpen, onAgain }) {
    this.file = file;
    this.item = template.content.firstElementChild.cloneNode(true);
    for (const part of this.item.querySelectorAll("[class]")) {
      this.#parts[part.className] = part;
    }
    count += 1;
    const { name, picture, again } = this.#parts;
    name.id = `scan-${count}`;
    name.tabIndex = -1;
    name.textContent = file.name;
    name.title = file.name;
    this.item.firstElementChild.setAttribute("aria-labelledby", name.id);
    picture.setAttribute("aria-label", `Enlarge ${file.name}`);
    picture.addEventListener("click", () => onOpen(this));
    again.addEventListener("click", () => {
      name.focus({ preventScroll: true });
      onAgain(this);
    });
    this.show("waiting", "Waiting");
  }

  get name() {
    return this.file.name;
  }

  get isDone() {
    return this.phase === "answered" || this.phase === "failed";
  }

  /** What it looks like, once something can be drawn. */
  get pictures() {
    const { pixels, map } = this.#parts;
    return pixels.hidden ? null : { pixels: pixels.src, map: map.hidden ? null : map.src };
  }

  /** The row for the CSV; one that got no answer says why. */
  get row() {
    if (this.answer) return { ...this.answer, name: this.name, classifier_id: this.classifierId };
    return { name: this.name, status: "unanswered", reason: this.problem?.code ?? this.phase };
  }

  /** The answer in one line. */
  get summary() {
    if (this.problem) return `no answer. ${explainProblem(this.problem)}`;
    return summariseAnswer(this.answer);
  }

  /** The statuses to count: one, of a scan with an answer. */
  get statuses() {
    return this.answer ? [this.answer.status] : [];
  }

  /** Say how far it has come. */
  show(phase, words) {
    this.phase = phase;
    this.item.dataset.phase = phase;
    this.#parts.state.textContent = words;
    this.#parts.state.hidden = this.isDone && !words;
  }

  /** Try to draw the file; what browsers cannot draw is left to the service. */
  async draw() {
    const { pixels } = this.#parts;
    if (!pixels.hidden) return;
    const url = this.#keep(this.file);
    pixels.src = url;
    try {
      await pixels.decode();
      this.#reveal(pixels);
    } catch {
      pixels.removeAttribute("src");
      this.render = "overlay";
    }
  }

  /** Whether the map would not lie on the scan as the browser draws it: turned or cut otherwise. */
  isMisfit(answer) {
    const { pixels } = this.#parts;
    return this.render === "map" && answer.width_px !== null
      && (pixels.naturalWidth !== answer.width_px || pixels.naturalHeight !== answer.height_px);
  }

  /** Show the service's answer. */
  async showAnswer(answer, classifierId) {
    this.answer = answer;
    this.classifierId = classifierId;
    this.problem = null;
    await this.#showMap(answer.heat_map_png);
    answer.heat_map_png = null; // it lives in the picture now
    this.#write(answer);
    this.item.dataset.status = answer.status;
    this.show("answered", { classified: "", abstained: "Abstained", rejected: "Rejected" }[answer.status] ?? answer.status);
  }

  /** Say that there is no answer, and why. */
  showProblem(problem) {
    this.problem = problem;
    const { words, detail, again, blank } = this.#parts;
    fill(words, explainProblem(problem));
    fill(detail, problem.detail);
    blank.textContent = "No answer";
    again.hidden = problem.code === "body_too_large"; // it will not have shrunk
    this.show("failed", "No answer");
  }

  /** Forget a failure, to try anew. */
  reset() {
    const { words, detail, again, blank } = this.#parts;
    this.problem = null;
    this.tries = 0;
    fill(words, null);
    fill(detail, null);
    blank.textContent = "";
    again.hidden = true;
    this.show("waiting", "Waiting");
  }

  /** Take it off the page. */
  remove() {
    this.item.remove();
    for (const url of this.#urls) URL.revokeObjectURL(url);
  }

  #write(answer) {
    const { verdict, share, words, detail, probs, facts, blank } = this.#parts;
    if (answer.status === "classified") {
      this.#parts.class.textContent = answer.predicted_class;
      share.textContent = formatShare(answer.confidence);
      verdict.hidden = false;
    }
    const reason = explainStatus(answer);
    fill(words, reason);
    fill(detail, reason && answer.detail !== reason ? answer.detail : null);
    probs.replaceChildren(...Object.entries(answer.probs ?? {}).map(
      ([name, fraction]) => renderBar(name, fraction, name === answer.predicted_class)));
    probs.hidden = !answer.probs;
    fill(facts, describeFacts(answer, this.file, this.render));
    blank.textContent = answer.status === "rejected" ? "Not readable" : "No picture";
  }

  async #showMap(base64) {
    if (!base64) return;
    const { pixels, map } = this.#parts;
    const target = this.render === "overlay" ? pixels : map;
    try {
      target.src = this.#keep(makePicture(base64));
      await target.decode();
      this.#reveal(target);
    } catch { // an answer without a map is an answer
      target.removeAttribute("src");
    }
  }

  #reveal(image) {
    image.hidden = false;
    this.#parts.blank.hidden = true;
    this.#parts.picture.disabled = false;
  }

  #keep(blob) {
    const url = URL.createObjectURL(blob);
    this.#urls.push(url);
    return url;
  }
}

/** Say an answer in one line. */
export function summariseAnswer(answer) {
  const { status, predicted_class: name, confidence, probs } = answer;
  if (status === "classified") return `${name}, ${formatShare(confidence)}`;
  if (status === "rejected") return `rejected. ${explainStatus(answer)}`;
  const [most] = Object.entries(probs ?? {}).sort((a, b) => b[1] - a[1]);
  return `abstained; most probable ${most ? `${most[0]}, ${formatShare(most[1])}` : "nothing"}`;
}

function describeFacts(answer, file, render) {
  const facts = [];
  if (answer.width_px) facts.push(`${answer.width_px} × ${answer.height_px} px`);
  if (answer.reason) facts.push(answer.reason);
  if (answer.status === "abstained" && answer.explained_class) {
    facts.push(`heat map of ${answer.explained_class}`);
  }
  if (answer.status !== "rejected" && render === "overlay") {
    facts.push("drawn by the service, heat map included");
  }
  return facts.join(" · ");
}

/** Build the bar of a class: its name, and how probable it is. */
export function renderBar(name, fraction, isPredicted) {
  const fillBar = element("i", "");
  fillBar.style.setProperty("--share", fraction);
  const bar = element("span", "track", fillBar);
  bar.setAttribute("aria-hidden", "true");
  const line = element("li", isPredicted ? "predicted" : "",
    element("span", "label", name), bar, element("span", "number", formatShare(fraction)));
  return line;
}

/** Write text into an element, which is hidden without. */
export function fill(part, text) {
  part.textContent = text ?? "";
  part.hidden = !text;
}

/** Make a picture of a PNG in base64. */
export function makePicture(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}
