// Building the page: elements, templates, and the parts that show an answer.

import { STATUS_LABELS, formatShare } from "./words.js";

/** Build an element with a class and children; text stays text, never markup. */
export function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

/** Copy a template; return its element, and its parts by their `data-part`. */
export function copyTemplate(id) {
  const item = document.getElementById(id).content.firstElementChild.cloneNode(true);
  const named = [...item.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]);
  return { item, parts: Object.fromEntries(named) };
}

/** Set an element's text; hide it if there is none. */
export function setText(part, text) {
  part.textContent = text ?? "";
  part.hidden = !text;
}

/** Show status, class, reason and probabilities of an answer. */
export function showAnswer({ state, verdict, name, share, detail, probs }, answer) {
  setText(state, STATUS_LABELS[answer.status]);
  verdict.hidden = answer.status !== "classified";
  if (!verdict.hidden) {
    name.textContent = answer.predicted_class;
    share.textContent = formatShare(answer.confidence);
  }
  setText(detail, answer.detail);
  showBars(probs, answer.probs, answer.predicted_class);
}

/** Show a bar for each class. */
export function showBars(list, shares, predicted) {
  list.hidden = !shares;
  list.replaceChildren(...Object.entries(shares ?? {}).map(([name, share]) => {
    const bar = element("i", "");
    bar.style.setProperty("--share", share);
    const track = element("span", "track", bar);
    track.setAttribute("aria-hidden", "true");
    return element("li", name === predicted ? "predicted" : "",
      element("span", "label", name), track, element("span", "number", formatShare(share)));
  }));
}

/** Make a URL of a PNG in base64. */
export function makeUrl(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
}
