// The classifier: what it is, and how accurate it was measured to be.

import { element } from "./dom.js";

/** Build the description of the classifier from GET /v1/model. */
export function renderModel(model) {
  const size = model.preprocessing?.size_px;
  const facts = [
    ["Classes", model.classes.join(", ")],
    ["Id", element("code", "", model.classifier_id)],
    ["Input", size && `${size} × ${size} px, grey`],
    ["Engine", model.runtime?.description],
  ].filter(([, value]) => value);
  const parts = [
    renderAccuracy(model.metrics),
    element("dl", "facts", ...facts.flatMap(([term, value]) => [
      element("dt", "", term), element("dd", "", value),
    ])),
    element("h3", "", "Intended use"), element("p", "", model.intended_use),
    element("h3", "", "Not intended for"), element("p", "", model.not_intended_for),
  ];
  if (model.model_card) {
    const text = element("pre", "", JSON.stringify(model.model_card, null, 2));
    text.tabIndex = 0; // arrow keys scroll it
    parts.push(element("details", "model-card", element("summary", "", "Model card"), text));
  }
  return parts;
}

/** Show the accuracy on the test images, else on the validation images. */
function renderAccuracy(metrics) {
  const named = { test: metrics?.test, validation: metrics?.val, labelled: metrics };
  const [name, scores] = Object.entries(named)
    .find(([, one]) => Number.isFinite(one?.accuracy)) ?? [];
  if (!scores) return element("p", "unmeasured", "The accuracy of this classifier is not known.");
  const { accuracy, accuracy_ci95: interval, n, without_near_duplicates: rest } = scores;
  const images = `${Number.isFinite(n) ? `${n.toLocaleString("en")} ` : ""}${name} images`;
  const box = element("div", "accuracy",
    element("p", "figure", formatPercent(accuracy), element("small", "", "accuracy")));
  if (interval) {
    const [low, high] = interval.map((end) => (100 * end).toFixed(1));
    box.append(element("p", "range", `${low} – ${high} %`),
      element("p", "", `95 % interval, on ${images}.`));
  } else {
    box.append(element("p", "", `On ${images}; no interval.`));
  }
  if (Number.isFinite(rest?.accuracy)) {
    const text = "on those without a near duplicate in the training images.";
    box.append(element("p", "", `${formatPercent(rest.accuracy)} ${text}`));
  }
  return box;
}

function formatPercent(fraction) {
  return `${(100 * fraction).toFixed(1)} %`;
}
