"use strict";
// Under the pointer: the nearest point of every curve. Without this script the charts stand as they are.
const format = (value) => {
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e6 || size < 1e-4 ? value.toExponential(2) : Number(value.toPrecision(4)).toString();
  return text.replace("-", "\u2212");
};

const nearest = (xs, x) => {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
};

for (const plot of document.querySelectorAll(".plot[data-chart]")) {
  const chart = JSON.parse(plot.dataset.chart);
  const tip = plot.appendChild(document.createElement("div"));
  const rule = plot.appendChild(document.createElement("div"));
  tip.className = "tip";
  rule.className = "rule";
  const hide = () => plot.classList.remove("hovered");
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const x = chart.low + share * (chart.high - chart.low);
    const all = chart.series.map((series) => series.x[nearest(series.x, x)]);
    const at = all.reduce((best, value) => (Math.abs(value - x) < Math.abs(best - x) ? value : best));
    tip.replaceChildren();
    const head = tip.appendChild(document.createElement("b"));
    head.textContent = `${chart.x} ${format(Math.round(at))}`;
    for (const series of chart.series) {
      const row = tip.appendChild(document.createElement("span"));
      const swatch = row.appendChild(document.createElement("i"));
      swatch.className = series.colour;
      row.append(series.label);
      const number = row.appendChild(document.createElement("em"));
      number.textContent = format(series.y[nearest(series.x, at)]);
    }
    const place = chart.high > chart.low ? (at - chart.low) / (chart.high - chart.low) : 0.5;
    rule.style.left = `${100 * place}%`;
    tip.style.left = place < 0.5 ? `calc(${100 * place}% + 12px)` : "auto";
    tip.style.right = place < 0.5 ? "auto" : `calc(${100 - 100 * place}% + 12px)`;
    plot.classList.add("hovered");
  });
}

// A method under the pointer in a legend stands out in the charts of its section.
for (const entry of document.querySelectorAll(".legend [data-key]")) {
  const section = entry.closest("section");
  const mark = (on) => () => {
    for (const line of section.querySelectorAll("g.line")) line.classList.toggle("dim", on && line.dataset.key !== entry.dataset.key);
  };
  entry.addEventListener("pointerenter", mark(true));
  entry.addEventListener("pointerleave", mark(false));
}
