// Text for people: numbers, statuses, and why a series has no class.

const INDETERMINATE = {
  too_few_slices: "The series has too few classified slices.",
  several_classes: "The slices are evidence for several classes.",
  weak_evidence: "Some slices are evidence for a tumour, but too few of them are neighbours.",
  localizer: "This is a localizer: a few slices of several planes.",
};

/** Summarise an answer in one line. */
export function summariseAnswer({ status, slices, predicted_class: name, confidence, detail, probs }) {
  if (status === "slices") return formatCount(slices.length, "slice");
  if (status === "classified") return `${name}, ${formatShare(confidence)}`;
  if (status === "rejected") return `rejected. ${detail}`;
  const [top, share] = Object.entries(probs).sort((a, b) => b[1] - a[1])[0];
  return `abstained; most probable ${top}, ${formatShare(share)}`;
}

/** Explain why a series has no class; empty if it has one. */
export function explainSeries({ answer, reason }) {
  if (answer !== "indeterminate") return "";
  return INDETERMINATE[reason] ?? "The slices do not agree on a class.";
}

/** Turn the name of a flag or a reason into words. */
export function spellOut(name) {
  return name.replaceAll("_", " ");
}

/** Join the facts that there are. */
export function joinFacts(...facts) {
  return facts.filter(Boolean).join(" · ");
}

/** Format a probability; only exactly 0 or 1 is shown as such. */
export function formatShare(fraction) {
  if (fraction > 0 && fraction < 0.001) return "< 0.1 %";
  if (fraction < 1 && fraction > 0.999) return "> 99.9 %";
  return `${(100 * fraction).toFixed(1)} %`;
}

export function formatBytes(bytes) {
  const units = ["B", "KiB", "MiB", "GiB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log2(Math.max(1, bytes)) / 10));
  const number = bytes / 1024 ** power;
  return `${number.toFixed(number < 10 && !Number.isInteger(number) ? 1 : 0)} ${units[power]}`;
}

/** Format a count with its noun: 1 scan, 2 scans. */
export function formatCount(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}
