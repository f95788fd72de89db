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
  if (isNumber(scores.no_twin?.accuracy)) {
    box.append(element("p", "", `${percent(scores.no_twin.accuracy)} on those that have no near-twin in the training images.`));
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
