// Building the page: elements, templates, and the parts that show an answer.

import { formatShare } from "./words.js";

/** Build an element with a class and children; text stays text, never markup. */
export function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

export function makeButton(onClick, ...children) {
  const made = element("button", "", ...children);
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}

/** Copy a template; return its element, and its parts by their `data-part`. */
export function copyTemplate(id) {
  const item = document.getElementById(id).content.firstElementChild.cloneNode(true);
  const named = [...item.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]);
  return { item, parts: Object.fromEntries(named) };
}

/** Show a PNG in base64; without one hide the image. */
export function setPicture(image, base64) {
  if (base64) image.src = `data:image/png;base64,${base64}`;
  else image.removeAttribute("src");
}

/** Build the status or class, the reason and the probabilities of an answer. */
export function renderAnswer({ status, predicted_class: name, confidence, detail, probs }) {
  const parts = [
    status === "classified"
      ? element("p", "verdict", element("span", "class", name), " ",
        element("span", "share", formatShare(confidence)))
      : element("p", `state ${status}`, status === "abstained" ? "Abstained" : "Rejected"),
  ];
  if (detail) parts.push(element("p", "detail", detail));
  if (probs) {
    const bars = element("ul", "probs", ...renderBars(probs, name));
    bars.ariaLabel = "Probabilities";
    parts.push(bars);
  }
  return parts;
}

/** Build a list item with a bar for each class. */
export function renderBars(shares, predicted) {
  return Object.entries(shares).map(([name, share]) => {
    const bar = element("i", "");
    bar.style.setProperty("--share", share);
    const track = element("span", "track", bar);
    track.ariaHidden = "true";
    return element("li", name === predicted ? "predicted" : "",
      element("span", "label", name), track, element("span", "number", formatShare(share)));
  });
}
