// The classifier's card: what answers, and how well it was measured to do.

import { formatBytes } from "./words.js";

const SPLITS = { test: "test", val: "validation", validation: "validation" };

/** Build the summary of what GET /v1/model says. */
export function renderModel(model) {
  const parts = [renderAccuracy(findScores(model.metrics))];
  const facts = [
    ["Classes", model.classes.join(", ")],
    ["Id", code(model.classifier_id)],
    ["Input", model.preprocessing?.size_px && `${model.preprocessing.size_px} × ${model.preprocessing.size_px} px, grey`],
    ["Computes with", model.runtime?.description],
  ].filter(([, value]) => value);
  parts.push(element("dl", "facts", ...facts.flatMap(([term, value]) => [
    element("dt", "", term), element("dd", "", value),
  ])));
  for (const [title, text] of [
    ["Meant for", model.intended_use], ["Not meant for", model.not_intended_for],
  ]) {
    if (text) parts.push(element("h3", "", title), element("p", "", text));
  }
  return parts;
}

/** Lay out a model card, section by section, as plain text. */
export function renderModelCard(card) {
  return Object.entries(card).flatMap(([name, value]) => [
    element("h3", "", nameField(name)), element("pre", "", outline(value).join("\n")),
  ]);
}

/** List the lines of a value of JSON; what is inside another is indented. */
function outline(value) {
  if (!isNested(value)) return [formatValue(value)];
  if (Array.isArray(value)) {
    return value.flatMap((item) => outline(item).map((line, at) => (at ? "  " : "• ") + line));
  }
  return Object.entries(value).flatMap(([name, inner]) => (isNested(inner)
    ? [nameField(name), ...outline(inner).map((line) => `  ${line}`)]
    : [`${nameField(name)}: ${formatValue(inner)}`]));
}

/** Tell whether a value takes lines of its own: not a list of numbers or single words. */
function isNested(value) {
  if (Array.isArray(value)) {
    return value.some((item) => Array.isArray(item) || isNested(item) || String(item).includes(" "));
  }
  return value !== null && typeof value === "object" && Object.keys(value).length > 0;
}

function formatValue(value) {
  if (Array.isArray(value)) return value.map(formatValue).join(", ") || "none";
  if (value === null || typeof value === "object") return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  return isNumber(value) ? String(Number(value.toPrecision(4 + 6 * Number.isInteger(value)))) : value;
}

function nameField(name) {
  return name.replaceAll("_", " ");
}

/** Say how large a file may be. */
export function describeLimit(model) {
  const most = model.limits?.body_bytes;
  return most ? `, up to ${formatBytes(most)} each` : "";
}

/** Find the scores of the most telling split: tested on before validated on. */
function findScores(metrics) {
  if (!metrics) return null;
  if (isNumber(metrics.accuracy)) return { name: "labelled", ...metrics };
  const split = Object.keys(SPLITS).find((key) => isNumber(metrics[key]?.accuracy));
  return split ? { name: SPLITS[split], ...metrics[split] } : null;
}

function renderAccuracy(scores) {
  if (!scores) {
    return element("p", "unmeasured", "No accuracy on its card: nobody has measured it.");
  }
  const box = element("div", "accuracy",
    element("p", "figure", percent(scores.accuracy), element("small", "", "accuracy")));
  const interval = scores.accuracy_ci95;
  const images = isNumber(scores.n) ? `${scores.n.toLocaleString("en")} ${scores.name} images` : `${scores.name} images`;
  if (Array.isArray(interval)) {
    const [low, high] = interval.map((end) => (100 * end).toFixed(1));
    box.append(element("p", "range", `${low} – ${high} %`));
    box.append(element("p", "", `95 % interval, on ${images}.`));
  } else {
    box.append(element("p", "", `On ${images}; no interval.`));
  }
  if (isNumber(scores.without_near_duplicates?.accuracy)) {
    box.append(element("p", "", `${percent(scores.without_near_duplicates.accuracy)} on those that have no near duplicate in the training images.`));
  }
  return box;
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

function percent(fraction) {
  return `${(100 * fraction).toFixed(1)} %`;
}

function code(text) {
  return element("code", "", text);
}

/** Build an element with a class, and nodes or text in it; never markup. */
export function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}
