"use strict";

const CONFIG = { displayModeBar: false, responsive: true };
const PALETTE = ["#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#db2777", "#4d7c0f",
  "#7c3aed", "#0f766e", "#b45309"];
const GRAY = "#94a3b8";
const DARK = matchMedia("(prefers-color-scheme: dark)");
const SHADES = {  // of a share, from none to all
  false: [[0, "#f8fafc"], [0.02, "#dbeafe"], [0.5, "#3b82f6"], [1, "#1e3a8a"]],
  true: [[0, "#1e293b"], [0.02, "#1e3a8a"], [0.5, "#3b82f6"], [1, "#dbeafe"]],
};
const CLEAR = { paper_bgcolor: "transparent", plot_bgcolor: "transparent" };

const read = (id) => JSON.parse(document.getElementById(id)?.textContent ?? "null");
const fill = (select, values, chosen) => select.replaceChildren(
  ...values.map((value) => new Option(value, value, false, value === chosen)));

/* The map of the features: a point a sample, coloured by an attribute; what is under the pointer is shown. */
function drawMaps() {
  const data = read("map-data");
  if (!data) return;
  const [set, layout, attribute] = ["set", "layout", "attribute"].map((name) => document.getElementById("map-" + name));
  const charts = [...document.querySelectorAll(".map")];
  const shown = () => charts.map((chart, run) => data[set.value][run]);
  const refill = () => {
    const known = shown().filter(Boolean);
    fill(layout, [...new Set(known.flatMap((one) => Object.keys(one.layouts)))], layout.value);
    fill(attribute, [...new Set(known.flatMap((one) => one.order)), "nothing"], attribute.value);
  };
  const draw = () => charts.forEach((chart, run) => {
    const one = shown()[run];
    chart.parentElement.hidden = !one || !one.layouts[layout.value];
    if (chart.parentElement.hidden) return;
    Plotly.react(chart, traces(one, one.layouts[layout.value], attribute.value), {
      height: Math.min(charts.length > 1 ? 440 : 560, Math.max(300, chart.clientWidth)), margin: { l: 8, r: 8, t: 8, b: 8 }, hovermode: "closest", font: { size: 11 },
      xaxis: { visible: false }, yaxis: { visible: false, scaleanchor: "x" }, showlegend: false, ...CLEAR,
    }, CONFIG);
    explain(chart);
    if (!chart.listens) {
      chart.on("plotly_hover", (event) => tell(shown()[run], event));
      chart.on("plotly_unhover", () => { document.getElementById("tip").hidden = true; });
      chart.listens = true;
    }
  });
  fill(set, Object.keys(data));
  set.addEventListener("change", () => { refill(); draw(); });
  layout.addEventListener("change", draw);
  attribute.addEventListener("change", draw);
  refill();
  draw();
}

/* Traces of one map: the most frequent classes have a colour each, all others are gray. */
function traces(one, clouds, attribute) {
  const labels = one.labels[attribute];
  const counts = new Map();
  for (const label of labels ?? []) if (label >= 0) counts.set(label, (counts.get(label) ?? 0) + 1);
  const frequent = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a) || a - b).slice(0, PALETTE.length);
  const groups = frequent.map((label, i) => ({ name: one.names[attribute][label], colour: PALETTE[i],
    rows: one.rows.filter((row) => labels[row] === label) }));
  const rest = one.rows.filter((row) => !labels || !frequent.includes(labels[row]));
  if (rest.length) groups.unshift({ name: labels ? "other" : "sample", colour: labels ? GRAY : PALETTE[0], rows: rest });
  const drawn = [];
  const parts = Object.entries(clouds);
  if (parts.length > 1) {
    const [a, b] = parts.map((part) => part[1]);
    drawn.push({ x: one.rows.flatMap((i) => [a[0][i], b[0][i], null]), y: one.rows.flatMap((i) => [a[1][i], b[1][i], null]),
      mode: "lines", line: { color: GRAY, width: .5 }, hoverinfo: "skip", showlegend: false });
  }
  for (const group of groups) for (const [i, [part, [x, y]]] of parts.entries()) {
    drawn.push({ x: group.rows.map((row) => x[row]), y: group.rows.map((row) => y[row]), customdata: group.rows,
      name: parts.length > 1 ? `${group.name}: ${part}` : group.name, mode: "markers", hoverinfo: "none",
      marker: { color: group.colour, size: 7, symbol: i ? "diamond-open" : "circle", opacity: .85 } });
  }
  return drawn;
}

/* A legend that wraps; a click hides a class, or shows it again. */
function explain(chart) {
  chart.nextElementSibling.replaceChildren(...chart.data.flatMap((trace, i) => {
    if (trace.mode !== "markers") return [];
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: trace.name });
    button.style = `--k:${trace.marker.color}`;
    button.addEventListener("click", () => {
      const hidden = button.classList.toggle("off");
      Plotly.restyle(chart, { visible: !hidden }, [i]);
    });
    return button;
  }));
}

function tell(one, event) {
  const tip = document.getElementById("tip");
  const row = event.points[0].customdata;
  const words = Object.entries(one.labels).map(([name, labels]) => [name, one.names[name][labels[row]]]);
  tip.replaceChildren();
  if (one.sheet) {
    const picture = document.createElement("div");
    picture.className = `thumb ${one.sheet}`;
    picture.style = `--s:96px;--n:${one.columns};--x:${row % one.columns};--y:${Math.floor(row / one.columns)}`;
    tip.append(picture);
  }
  const lines = [one.captions?.[row], ...words.filter((word) => word[1]).map((word) => word.join(": "))];
  for (const line of lines.filter(Boolean)) tip.append(Object.assign(document.createElement("div"), { textContent: line }));
  tip.hidden = false;
  const { clientX: x = 0, clientY: y = 0 } = event.event ?? {};
  tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(8, Math.min(y + 14, innerHeight - tip.offsetHeight - 8))}px`;
}

/* Confusions: a figure a run, of the choice. */
function drawConfusions() {
  const data = read("confusion-data");
  if (!data) return;
  const choice = document.getElementById("confusion-choice");
  const draw = () => document.querySelectorAll(".confusion").forEach((chart, run) => {
    const figure = data[choice.value][run];
    chart.parentElement.hidden = !figure;
    if (!figure) return;
    const heat = figure.data.map((trace) => ({ ...trace, colorscale: SHADES[DARK.matches] }));
    const layout = { ...figure.layout, ...CLEAR };
    if (chart.clientWidth < 500 && heat[0].x.length > 10) {  // names would lie over each other, and the rows have them
      layout.height -= layout.margin.b - 10;
      layout.margin = { ...layout.margin, b: 10 };
      layout.xaxis = { ...layout.xaxis, showticklabels: false };
    }
    Plotly.react(chart, heat, layout, CONFIG);
    const [note, list] = [chart.nextElementSibling, chart.parentElement.lastElementChild];
    note.textContent = figure.note;
    list.replaceChildren(...figure.pairs.map((pair) => Object.assign(document.createElement("li"), { textContent: pair })));
  });
  fill(choice, Object.keys(data));
  choice.addEventListener("change", draw);
  DARK.addEventListener("change", draw);
  draw();
}

/* Galleries: one set at a time, and neighbours marked by one attribute at a time. */
function showGalleries() {
  const set = document.getElementById("gallery-set");
  if (!set) return;
  const show = () => document.querySelectorAll("[data-set]").forEach((part) => { part.hidden = part.dataset.set !== set.value; });
  set.addEventListener("change", show);
  show();
  const attribute = document.getElementById("gallery-attribute");
  const mark = () => document.querySelectorAll("[data-right]").forEach((item) => {
    const right = JSON.parse(item.dataset.right)[attribute.value];
    item.classList.toggle("right", right === 1);
    item.classList.toggle("wrong", right === 0);
  });
  attribute?.addEventListener("change", mark);
  if (attribute) mark();
}

drawMaps();
drawConfusions();
showGalleries();
document.documentElement.dataset.ready = "yes";
