"use strict";

// The threshold slider: moves through exact counts prepared for a grid of thresholds.
for (const box of document.querySelectorAll("[data-slider]")) startSlider(box);

function startSlider(box) {
  const data = JSON.parse(box.querySelector("script").textContent);
  const score = box.querySelector("[data-score]");
  const rate = box.querySelector("[data-rate]");
  const last = data.t.length - 1; // above every score
  const first = data.rates.findLastIndex((_, j) => data.at[j] === data.start);
  let now = data.start;

  function rateOf(i) { // the smallest rate whose threshold lies at or below
    const j = data.at.findIndex((at) => at <= i);
    return j < 0 ? data.rates.length - 1 : j;
  }

  function show(i, j) {
    now = Math.max(0, Math.min(last, i));
    box.style.setProperty("--x", 100 * data.x[now] + "%");
    score.value = 1000 * data.x[now];
    const threshold = now === last ? "above all scores" : short(data.t[now]);
    score.setAttribute("aria-valuetext", "score " + threshold);
    const chosen = j ?? rateOf(now);
    if (rate) showRate(chosen);
    const values = data.n.length === 2 ? labelled(data, now) : plain(data, now);
    values.threshold = threshold;
    if (data.n.length === 1 && rate && now <= data.at[0]) values.words += byChance(data.rates[chosen] * data.n[0]);
    for (const cell of box.querySelectorAll("[data-count]")) cell.textContent = values[cell.dataset.count];
    box.querySelector("[data-words]").textContent = values.words;
  }

  function showRate(j) {
    rate.value = j;
    const beyond = now > data.at[0];
    const lax = now < data.at[data.rates.length - 1];
    const text = (beyond ? "below " : lax ? "above " : "") + percent(data.rates[j]);
    box.querySelector("[data-rate-text]").textContent = text;
    rate.setAttribute("aria-valuetext", text + (beyond ? ", stricter than the calibration can promise" : ""));
  }

  score.addEventListener("input", () => show(firstAtLeast(data.x, score.value / 1000)));
  score.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.round(last / 20));
    const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: page, PageDown: -page, Home: -last, End: last };
    if (!(event.key in steps)) return;
    event.preventDefault();
    show(now + steps[event.key]);
  });
  rate?.addEventListener("input", () => show(data.at[rate.value], Number(rate.value)));
  const start = () => show(data.start, first < 0 ? undefined : startRate(data, first));
  box.querySelector("[data-reset]").addEventListener("click", start);
  start();
}

function startRate(data, first) { // among equal thresholds the rate that was asked for
  const j = data.rates.findIndex((r) => Math.abs(r - data.target) < 1e-12);
  return j >= 0 && data.at[j] === data.start ? j : first;
}

function firstAtLeast(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] >= value) high = middle; else low = middle + 1;
  }
  return low;
}

function labelled(data, i) {
  const [fp, tp] = data.above.map((counts) => counts[i]);
  const [normals, anomalies] = data.n;
  const tpr = anomalies ? tp / anomalies : NaN, fpr = normals ? fp / normals : NaN;
  return {
    tp: count(tp), fn: count(anomalies - tp), fp: count(fp), tn: count(normals - fp),
    tpr: percent(tpr), fpr: percent(fpr), precision: percent(tp / (tp + fp)),
    accuracy: percent((tpr + 1 - fpr) / 2), f1: fixed((2 * tpr) / (1 + tpr + fpr)),
    words: `Finds ${count(tp)} of ${count(anomalies)} anomalous images, with ${count(fp)} false ${fp === 1 ? "alarm" : "alarms"} among ${count(normals)} normal ones.`,
  };
}

function plain(data, i) {
  const [flagged] = data.above.map((counts) => counts[i]);
  const [images] = data.n;
  return {
    flagged: count(flagged), passed: count(images - flagged), share: percent(flagged / images),
    words: `Flags ${count(flagged)} of ${count(images)} ${images === 1 ? "image" : "images"}.`,
  };
}

function byChance(expected) {
  const about = expected < 10 ? String(Number(expected.toPrecision(2))) : count(Math.round(expected));
  return ` Were all of them normal, about ${about} would be flagged by chance.`;
}

function count(n) { return n.toLocaleString("en"); }
function fixed(v) { return Number.isFinite(v) ? rounded(v, 3) : "–"; }
function short(v) {
  if (Math.abs(v) < 1e4) return String(Number(v.toPrecision(4)));
  return Math.abs(v) < 1e9 ? v.toLocaleString("en", { maximumSignificantDigits: 4 }) : v.toExponential(2);
}
function rounded(v, places) { // an exact half goes to the even digit, as in the rest of the page
  if ((v * 2 ** (places + 1)) % 2 !== 1) return v.toFixed(places);
  const below = Math.floor(v * 10 ** places);
  return ((below + (below % 2)) / 10 ** places).toFixed(places);
}
function percent(v) {
  if (!Number.isFinite(v)) return "–";
  const hundredths = 100 * v;
  if (v < 1 && hundredths >= 99.95) return "> 99.9\u00a0%";
  const places = hundredths >= 9.95 ? 1 : hundredths > 0 ? 1 - Math.floor(Math.log10(hundredths)) : 0;
  return Number(rounded(hundredths, places)) + "\u00a0%";
}

// The viewer: one dialog, filled from the template beside the opened item.
const viewer = document.getElementById("viewer");
const body = viewer.querySelector("[data-body]");
let opener = null;
let truthShown = false;

function siblings() { return [...opener.closest(".items").querySelectorAll(".item")]; }

function fill(button) {
  opener = button;
  body.replaceChildren(document.getElementById(button.dataset.open).content.cloneNode(true));
  let input = button.querySelector("img").src; // for the pictures that are not kept twice
  for (const image of body.querySelectorAll("[data-input]")) {
    if (image.hasAttribute("src")) input = image.src; else image.src = input;
  }
  addTruth();
  const all = siblings(), at = all.indexOf(button);
  viewer.querySelector("[data-place]").textContent = `${at + 1} of ${all.length}`;
  viewer.querySelector('[data-step="-1"]').disabled = at === 0;
  viewer.querySelector('[data-step="1"]').disabled = at === all.length - 1;
  body.scrollTop = 0;
}

function addTruth() { // the true defect's outline over every map, at will
  const truth = body.querySelector("svg.truth"), box = body.querySelector("[data-truth]");
  if (!box) return;
  const copies = [...body.querySelectorAll(".map .picture")].map((picture) => picture.appendChild(truth.cloneNode(true)));
  const show = () => { for (const copy of copies) copy.style.display = truthShown ? "" : "none"; };
  box.checked = truthShown;
  box.addEventListener("change", () => { truthShown = box.checked; show(); });
  show();
}

function step(by) {
  const next = siblings()[siblings().indexOf(opener) + by];
  if (next) { fill(next); body.querySelector("h2").focus(); }
}

for (const button of document.querySelectorAll(".item")) {
  button.addEventListener("click", () => {
    fill(button);
    viewer.showModal();
    body.querySelector("h2").focus();
  });
}
for (const button of viewer.querySelectorAll("[data-step]")) button.addEventListener("click", () => step(Number(button.dataset.step)));
viewer.querySelector("[data-close]").addEventListener("click", () => viewer.close());
viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
viewer.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
viewer.addEventListener("close", () => { body.replaceChildren(); opener?.focus(); });

const threshold = document.getElementById("threshold");
if (threshold) threshold.hidden = false;
