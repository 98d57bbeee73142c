// The page of a report: draws what payload.py computed. Everything of a record is written as text, never as markup.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const ROW = 17; // pixels to a layer
const STYLE = { background: "none", fontSize: "12px", fontFamily: "inherit" };

// ---------------------------------------------------------------- text and elements

const three = (value) => (value >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3))));
const amount = (value) => d3.format(".3~s")(value).replace(/([kMG])$/, " $1");
const bytes = (value) => d3.format(".3~s")(value).replace(/[kMG]?$/, " $&B");
const percent = (value) => `${(100 * value).toFixed(2)} %`;
const times = (value) => (value == null ? "" : `${value.toFixed(2)}x`);
const signed = (value) => (value == null ? "" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2));
const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;
const label = (method, budget) => (budget ? `${method}, ${budget}` : method);

/** An element with attributes (`on...` are listeners) and children; texts become text nodes. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null));
  return element;
}

const facts = (pairs) => h("dl", { class: "facts" }, pairs.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));

// ---------------------------------------------------------------- how methods look

const polygon = (corners) => ({
  draw(context, size) {
    const r = Math.sqrt(size / Math.PI);
    corners.forEach(([x, y], i) => context[i ? "lineTo" : "moveTo"](x * r, y * r));
    context.closePath();
  },
});
const CROSS = [[-.4, -1.2], [.4, -1.2], [.4, -.4], [1.2, -.4], [1.2, .4], [.4, .4], [.4, 1.2], [-.4, 1.2], [-.4, .4], [-1.2, .4], [-1.2, -.4], [-.4, -.4]];
const SYMBOLS = {
  circle: d3.symbolCircle, square: d3.symbolSquare, triangle: d3.symbolTriangle, diamond: d3.symbolDiamond, star: d3.symbolStar,
  down: polygon([[-1.15, -.8], [1.15, -.8], [0, 1.25]]),
  plus: polygon(CROSS),
  times: polygon(CROSS.map(([x, y]) => [(x - y) * Math.SQRT1_2, (x + y) * Math.SQRT1_2])),
  hexagon: polygon(d3.range(6).map((i) => [1.12 * Math.sin(i * Math.PI / 3), 1.12 * Math.cos(i * Math.PI / 3)])),
};
const methods = new Map(data.methods.map((method) => [method.name, {
  ...method,
  fill: method.colour == null ? (method.name === "dense" ? "var(--dense)" : "var(--plain)") : `var(--c${method.colour})`,
  symbol: SYMBOLS[method.marker],
}]));

function sign({ fill, symbol }) {
  const svg = d3.create("svg").attr("class", "marker").attr("viewBox", "-7 -7 14 14").attr("aria-hidden", "true");
  svg.append("path").attr("d", d3.symbol(symbol, 70)()).attr("fill", fill);
  return svg.node();
}

const marker = (name) => sign(methods.get(name));

// ---------------------------------------------------------------- state

const AXES = {
  time: { name: "time", unit: (place) => `measured time for a batch of ${place.batch_size} (ms)`, of: (p) => [p.median_ms, p.q1_ms, p.q3_ms] },
  ratio: { name: "time, dense = 1", unit: () => "measured time, dense network = 1", of: (p) => [p.ratio, p.q1_ms * p.ratio / p.median_ms, p.q3_ms * p.ratio / p.median_ms] },
  speed: { name: "images per second", unit: () => "images per second", more: true, of: (p) => [p.median_ms, p.q3_ms, p.q1_ms].map((ms) => 1000 * place().batch_size / ms) },
  macs: { name: "MACs", unit: () => "multiply-accumulates (MACs) of one image", of: (p) => [p.macs] },
  params: { name: "parameters", unit: () => "parameters", of: (p) => [p.params] },
  memory: { name: "memory of activations", unit: () => "bytes of float32 activations of one image, peak", of: (p) => [p.activation_bytes] },
};
const PARTS = { backend: "Backend", number_format: "Number format", batch_size: "Batch size", threads: "Threads", device: "Device" };

for (const place of data.places) place.number_format ??= "float32";

/** Names of the methods of a group, those with the most networks first. */
function methodsOf(group) {
  const used = new Set(data.points.filter((point) => point.group === group).map((point) => point.method));
  return data.methods.map((method) => method.name).filter((name) => used.has(name));
}

const state = {
  group: 0, place: data.points[0]?.place ?? 0, axis: data.apart ? "ratio" : "time", scale: "log", front: "all",
  shown: data.groups.map((_, group) => new Set(methodsOf(group).slice(0, data.at_once))),
  sort: { key: "ratio", descending: false }, chosen: null,
};
const place = () => data.places[state.place] ?? {};
const shown = () => state.shown[state.group];
const inGroup = () => data.points.filter((point) => point.group === state.group);
const here = () => inGroup().filter((point) => point.place === state.place);
const visible = () => here().filter((point) => shown().has(point.method) && AXES[state.axis].of(point)[0] != null);

/** The place that has `value` for `part` and is otherwise most like the present one. */
function nearest(part, value) {
  const known = [...new Set(inGroup().map((point) => point.place))];
  const alike = (number) => d3.sum(Object.keys(PARTS), (other) => data.places[number][other] === place()[other]);
  return d3.greatest(known.filter((number) => String(data.places[number][part]) === String(value)), alike);
}

// ---------------------------------------------------------------- controls

function segments(id, name, options, current, change) {
  return h("fieldset", {}, h("legend", {}, name), h("div", { class: "segments" }, options.map(([value, text]) =>
    h("label", {}, h("input", { type: "radio", name: id, value, checked: String(value) === String(current), onchange: () => change(value) }), text))));
}

function select(id, name, options, current, change) {
  const picker = h("select", { id, onchange: (event) => change(event.target.value) },
    options.map(([value, text]) => h("option", { value, selected: String(value) === String(current) }, text)));
  return h("div", { class: "choice" }, h("label", { for: id, class: "name" }, name), picker);
}

function drawControls() {
  const focused = document.activeElement, again = focused?.name ? `[name="${focused.name}"]:checked` : focused?.id ? `#${focused.id}` : null;
  const inside = byId("controls").contains(focused);
  const set = (key) => (value) => { state[key] = value; draw(); };
  const parts = [];
  if (data.groups.length > 1)
    parts.push(select("group", "Network and data", data.groups.map((title, number) => [number, title]), state.group, (value) => {
      state.group = Number(value);
      if (!here().length && inGroup().length) state.place = inGroup()[0].place;
      draw();
    }));
  for (const [part, name] of Object.entries(PARTS)) {
    const values = [...new Set(inGroup().map((point) => data.places[point.place][part]))].sort(d3.ascending);
    if (!["device", "number_format"].includes(part) || values.length > 1)
      parts.push(segments(part, name, values.map((value) => [value, String(value)]), place()[part], (value) => { state.place = nearest(part, value); draw(); }));
  }
  const axes = Object.entries(AXES).filter(([key, axis]) => key === state.axis || inGroup().some((point) => axis.of(point)[0] != null));
  parts.push(select("axis", "Horizontal axis", axes.map(([key, axis]) => [key, axis.name]), state.axis, set("axis")));
  parts.push(segments("scale", "Scale", [["log", "log"], ["linear", "linear"]], state.scale, set("scale")));
  parts.push(select("front", "Front line", [["all", "of all shown"], ["each", "of each method"], ["none", "none"]], state.front, set("front")));
  byId("controls").replaceChildren(...parts);
  if (inside && again) byId("controls").querySelector(again)?.focus();
}

function drawMethods() {
  const mine = methodsOf(state.group), focused = document.activeElement?.dataset?.method;
  const toggle = (name) => { shown().has(name) ? shown().delete(name) : shown().add(name); draw(); };
  const only = (names) => () => { state.shown[state.group] = new Set(names); draw(); };
  const buttons = mine.map((name) =>
    h("button", { type: "button", "data-method": name, "aria-pressed": String(shown().has(name)), onclick: () => toggle(name) }, marker(name), name));
  const bulk = [["all", mine], ["none", []], ["first eight", mine.slice(0, data.at_once)]];
  byId("methods").replaceChildren(...buttons, ...bulk.map(([text, names]) => h("button", { type: "button", class: "all", "data-method": ` ${text}`, onclick: only(names) }, text)));
  if (focused) [...byId("methods").children].find((button) => button.dataset.method === focused)?.focus();
}

// ---------------------------------------------------------------- the chart

/** Points that no other beats in both, in the order of x. */
function front(points, axis) {
  const x = (point) => axis.of(point)[0], better = axis.more ? d3.descending : d3.ascending;
  const sorted = d3.sort(points, (a, b) => better(x(a), x(b)) || d3.descending(a.accuracy, b.accuracy));
  let best = -1;
  return d3.sort(sorted.filter((point) => point.accuracy > best && ((best = point.accuracy), true)), x);
}

/** Round values between two, so many at least: as many as have room, each with its number. */
function roundTicks(low, high, least) {
  if (state.scale === "linear") return d3.ticks(low, high, least + 2);
  const powers = d3.range(Math.floor(Math.log10(low)), Math.ceil(Math.log10(high)) + 1).map((exponent) => 10 ** exponent);
  const sets = [[1], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 7]].map((digits) => powers.flatMap((power) => digits.map((digit) => digit * power)));
  return [...sets, d3.ticks(low, high, least + 1)].map((ticks) => ticks.filter((tick) => tick >= low && tick <= high)).find((ticks) => ticks.length >= least)
    ?? d3.ticks(low, high, least + 1);
}

function drawChart() {
  const axis = AXES[state.axis], points = visible(), x = (point) => axis.of(point)[0], y = (point) => 100 * point.accuracy;
  const figure = byId("chart"), width = Math.max(300, figure.clientWidth), narrow = width < 560;
  if (!points.length) {
    figure.replaceChildren(h("p", { class: "note" }, "Nothing to draw here: switch a method on, or choose another place of measuring."));
    return;
  }
  const dense = here().find((point) => point.method === "dense");
  const step = { stroke: "var(--soft)", strokeWidth: 4, strokeOpacity: .3, strokeLinejoin: "round", curve: axis.more ? "step-before" : "step-after", x, y };
  const own = [...methods.values()].map((look) => ({ look, mine: points.filter((p) => p.method === look.name) })).filter(({ mine }) => mine.length);
  const ticks = roundTicks(...d3.extent(points.flatMap(axis.of)), narrow ? 3 : 5);
  const marks = [Plot.gridX(ticks, { strokeOpacity: .12 }), Plot.gridY({ strokeOpacity: .12 })];
  if (dense && axis.of(dense)[0] != null) {
    const line = { stroke: "var(--dense)", strokeDasharray: "2 4", strokeOpacity: .65 };
    marks.push(Plot.ruleY([y(dense)], line), Plot.ruleX([x(dense)], line));
    const slow = axis.more ? "left" : "right"; // the side where fewer networks lie
    const beside = { frameAnchor: slow, y: () => y(dense), dy: -8, dx: axis.more ? 4 : -4, fontSize: 11, fill: "var(--soft)" };
    marks.push(Plot.text([`dense ${percent(dense.accuracy)}`], beside));
  }
  if (state.front === "all") marks.push(Plot.line(front(points, axis), step));
  for (const { look, mine } of own) {
    if (state.front === "each") marks.push(Plot.line(front(mine, axis), { ...step, stroke: look.fill }));
    else if (mine.length > 1) marks.push(Plot.line(d3.sort(mine, x), { x, y, stroke: look.fill, strokeWidth: 1.2, strokeOpacity: .45 }));
    const bar = { stroke: look.fill, strokeWidth: 1.5, strokeOpacity: .5 }; // points stand out from their spread
    const spread = mine.filter((p) => p.accuracy_high > p.accuracy_low), wide = mine.filter((p) => axis.of(p).length > 1);
    marks.push(Plot.ruleX(spread, { x, y1: (p) => 100 * p.accuracy_low, y2: (p) => 100 * p.accuracy_high, ...bar }));
    marks.push(Plot.ruleY(wide, { y, x1: (p) => axis.of(p)[1], x2: (p) => axis.of(p)[2], ...bar }));
  }
  for (const { look, mine } of own)
    marks.push(Plot.dot(mine, {
      x, y, fill: look.fill, symbol: look.symbol, r: look.name === "dense" ? 7.5 : 5.5, stroke: "var(--paper)", strokeWidth: 1, sort: null, className: "dots",
    }));
  const svg = Plot.plot({
    width, height: narrow ? 340 : 520, marginLeft: 48, marginRight: 16, marginTop: 26, marginBottom: 44,
    style: STYLE,
    x: {
      type: state.scale, label: `${axis.unit(place())} ${axis.more ? "→ better" : "← better"}`, labelAnchor: "center", labelArrow: "none",
      tickFormat: ["time", "ratio"].includes(state.axis) ? three : d3.format("~s"), ticks, insetLeft: 14, insetRight: 14,
    },
    y: { label: "test accuracy (%)", labelArrow: "up", insetTop: 8, insetBottom: 8, ticks: 7 },
    marks,
  });
  svg.setAttribute("role", "group");
  svg.setAttribute("aria-label", `${data.groups[state.group]}: accuracy against ${axis.name}, ${plural(points.length, "network")}`);
  figure.replaceChildren(svg);
  interact(svg, own);
}

/** Points are shown by the pointer that comes near, and walked through with the arrow keys. */
function interact(svg, own) {
  const dots = [];
  svg.querySelectorAll(".dots").forEach((group, series) => [...group.querySelectorAll("path,circle")].forEach((node, position) =>
    dots.push({ node, point: own[series].mine[position] })));
  dots.sort((a, b) => d3.ascending(AXES[state.axis].of(a.point)[0], AXES[state.axis].of(b.point)[0]));
  dots.forEach(({ node, point }, position) => {
    node.classList.add("dot");
    node.classList.toggle("chosen", same(point, state.chosen));
    node.setAttribute("role", "button");
    node.setAttribute("tabindex", position ? "-1" : "0");
    node.setAttribute("aria-label", `${label(point.method, point.budget)}: ${percent(point.accuracy)}, ${three(point.median_ms)} ms`);
    node.addEventListener("focus", () => showTip(node, point));
    node.addEventListener("blur", hideTip);
    node.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (move) {
        const next = dots[(position + move + dots.length) % dots.length].node;
        node.setAttribute("tabindex", "-1");
        next.setAttribute("tabindex", "0");
        next.focus();
      } else if (event.key === "Enter" || event.key === " ") choose(point, true);
      else if (event.key === "Escape") hideTip();
      else return;
      event.preventDefault();
    });
  });
  const near = (event) => {
    const distance = ({ node }) => {
      const box = node.getBoundingClientRect();
      return Math.hypot(box.x + box.width / 2 - event.clientX, box.y + box.height / 2 - event.clientY);
    };
    const best = d3.least(dots, distance);
    return best && distance(best) < 28 ? best : null;
  };
  svg.addEventListener("pointermove", (event) => { const best = near(event); best ? showTip(best.node, best.point) : hideTip(); });
  svg.addEventListener("pointerleave", hideTip);
  svg.addEventListener("click", (event) => { const best = near(event); if (best) choose(best.point); });
}

const same = (a, b) => a && b && a.group === b.group && a.method === b.method && a.budget === b.budget;

let tipOf = null;

function showTip(node, point) {
  if (tipOf === point) return;
  tipOf = point;
  const tip = byId("tip"), box = node.getBoundingClientRect(), page = document.documentElement;
  tip.replaceChildren(h("b", {}, marker(point.method), ` ${label(point.method, point.budget)}`), facts([...figures(point), ...plan(point)]));
  tip.hidden = false;
  const right = box.right + tip.offsetWidth + 16 < page.clientWidth;
  const left = right ? box.right + 10 : Math.max(6, Math.min(box.left - tip.offsetWidth - 10, page.clientWidth - tip.offsetWidth - 6));
  const below = box.bottom + tip.offsetHeight + 12 < page.clientHeight || box.top < tip.offsetHeight;
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${(below ? box.bottom + 8 : box.top - tip.offsetHeight - 8) + scrollY}px`;
}

const hideTip = () => { tipOf = null; byId("tip").hidden = true; };

// ---------------------------------------------------------------- what is known of a point

function figures(point) {
  const spread = point.seeds > 1 ? ` (${percent(point.accuracy_low)} to ${percent(point.accuracy_high)}, ${point.seeds} seeds)` : "";
  return [
    ["accuracy", percent(point.accuracy) + spread],
    ["to dense", point.accuracy_change == null ? null : `${signed(point.accuracy_change)} points`],
    ["time", `${three(point.median_ms)} ms (${three(point.q1_ms)} to ${three(point.q3_ms)}), ${times(point.ratio)} of dense`],
    ["MACs", `${amount(point.macs)}, ${times(point.macs_ratio)}`],
    ["parameters", `${amount(point.params)}, ${times(point.params_ratio)}`],
    ["activations", point.activation_bytes && `${bytes(point.activation_bytes)} at the peak`],
  ].filter(([, value]) => value);
}

/** Run, widths and plan of the networks behind a point; where seeds differ, of the first. */
function plan(point) {
  const networks = point.networks.map((number) => data.networks[number]), first = networks[0];
  const runs = [...new Set(networks.map((network) => data.runs[network.run].name))];
  const pairs = [[runs.length > 1 ? "runs" : "run", runs.length > 1 ? `${runs[0]} and ${runs.length - 1} more` : runs[0]]];
  const widths = first.widths ?? first.search?.widths?.map?.((group) => group.kept);
  if (widths) pairs.push(["widths", widths.join(" ")]);
  if (first.chosen) pairs.push(["chosen", `${first.chosen}, of ${Object.keys(first.candidates ?? {}).join(", ")}`]);
  if (first.collapsed) {
    const [low, high] = d3.extent(Object.values(first.collapsed));
    pairs.push(["collapsed", `${plural(Object.keys(first.collapsed).length, "block")}, ${percent(low)} to ${percent(high)} of the variance`]);
  }
  const after = outlineOf(first), before = outlineOf(originalOf(first));
  if (after && before) pairs.push(["residuals", saidOf(counted(fates(before, after, first)))]);
  else if (first.removal) pairs.push(["residuals", `${first.removal.removed.length} removed, ${Object.keys(first.removal.kept).length} kept`]);
  if (first.removal) pairs.push(["exact to", (first.removal.max_error ?? NaN).toExponential(1)]);
  if (first.search) {
    const { method, episodes, width, seconds, verified_ratio: cost } = first.search;
    const parts = [method, episodes && plural(episodes.reward.length, "episode"), width != null && `width ${three(width)}`, cost != null && `${times(cost)} of the cost`, seconds != null && `${Math.round(seconds)} s`];
    pairs.push(["search", parts.filter(Boolean).join(", ")]);
  }
  return pairs;
}

function choose(point, focus = false) {
  state.chosen = point;
  hideTip();
  drawDetails();
  document.querySelectorAll("#table tbody tr").forEach((row) => row.classList.toggle("chosen", row.dataset.key === JSON.stringify([point.method, point.budget])));
  const position = document.activeElement;
  drawChart();
  if (focus && position?.classList.contains("dot")) document.querySelector(".dot.chosen")?.focus();
  hideTip();
}

function drawDetails() {
  const chosen = here().find((point) => same(point, state.chosen)), box = byId("details");
  if (!chosen) {
    box.replaceChildren(h("h3", {}, "No network chosen"), h("p", { class: "note" },
      "Point at a network for its figures; click it, or walk the points with the arrow keys and press Enter, to keep them here."));
    return;
  }
  const first = data.networks[chosen.networks[0]], extra = [];
  for (const [reason, kept] of d3.group(Object.entries(first.removal?.kept ?? {}), ([, reason]) => reason))
    extra.push([plural(kept.length, "residual"), `stayed (${kept.map(([name]) => name).join(", ")}): ${reason}`]);
  for (const [name, verdict] of Object.entries(first.candidates ?? {}))
    extra.push([`candidate ${name}`, verdict.loss != null ? `loss ${three(verdict.loss)}` : String(verdict.refused ?? "")]);
  const runs = [...new Set(chosen.networks.map((number) => data.networks[number].run))];
  const go = (section, id, value) => () => {
    byId(id).value = value;
    byId(id).dispatchEvent(new Event("change"));
    byId(section).scrollIntoView();
    byId(id).focus({ preventScroll: true });
  };
  box.replaceChildren(
    h("h3", {}, marker(chosen.method), ` ${label(chosen.method, chosen.budget)}`),
    facts([...figures(chosen), ...plan(chosen), ...extra]),
    h("p", {}, h("button", { type: "button", onclick: go("layers", "network", chosen.networks[0]) }, "its layers"),
      h("button", { type: "button", onclick: go("curves", "run", first.run) }, "its training")),
    ...runs.slice(0, 1).map((run) => h("pre", {}, h("code", {}, data.runs[run].command))));
}

// ---------------------------------------------------------------- the table

const COLUMNS = [
  ["method", "method", (p) => p.method, null],
  ["budget", "budget", (p) => p.budget, (p) => p.budget],
  ["accuracy", "accuracy", (p) => p.accuracy, (p) => percent(p.accuracy) + (p.seeds > 1 ? ` (${(100 * p.accuracy_low).toFixed(2)}–${(100 * p.accuracy_high).toFixed(2)})` : "")],
  ["change", "points", (p) => p.accuracy_change, (p) => signed(p.accuracy_change)],
  ["ms", "ms", (p) => p.median_ms, (p) => three(p.median_ms)],
  ["ratio", "of dense", (p) => p.ratio, (p) => times(p.ratio)],
  ["speed", "images/s", (p) => 1000 / p.median_ms, (p) => amount(1000 * place().batch_size / p.median_ms)],
  ["macs", "MACs", (p) => p.macs, (p) => amount(p.macs)],
  ["macs_ratio", "of dense", (p) => p.macs_ratio, (p) => times(p.macs_ratio)],
  ["params", "parameters", (p) => p.params, (p) => amount(p.params)],
  ["params_ratio", "of dense", (p) => p.params_ratio, (p) => times(p.params_ratio)],
  ["seeds", "seeds", (p) => p.seeds, (p) => String(p.seeds)],
];

function drawTable() {
  const { key, descending } = state.sort, of = COLUMNS.find(([name]) => name === key)[2];
  const rows = d3.sort(here().filter((point) => shown().has(point.method)), (a, b) => (descending ? d3.descending : d3.ascending)(of(a), of(b)));
  const focused = document.activeElement?.dataset?.sort;
  const sortBy = (name) => () => { state.sort = { key: name, descending: name === key && !descending }; drawTable(); };
  const order = descending ? "descending" : "ascending";
  const head = COLUMNS.map(([name, text]) => h("th", { scope: "col", class: name === "budget" ? "text" : null, "aria-sort": name === key ? order : null },
    h("button", { type: "button", "data-sort": name, onclick: sortBy(name) }, text)));
  const body = rows.map((point) => h("tr", { "data-key": JSON.stringify([point.method, point.budget]), class: same(point, state.chosen) ? "chosen" : null },
    COLUMNS.map(([name, , , text]) => name === "method"
      ? h("td", {}, h("button", { type: "button", title: "keep this network's figures beside the chart", onclick: () => choose(point) }, marker(point.method), ` ${point.method}`))
      : h("td", { class: name === "budget" ? "text" : null }, text(point)))));
  byId("table").replaceChildren(h("thead", {}, h("tr", {}, head)), h("tbody", {}, body));
  if (focused) byId("table").querySelector(`[data-sort="${focused}"]`)?.focus();
}

// ---------------------------------------------------------------- layer by layer

const originalOf = (network) => data.networks.find((other) => other.run === network.run && other.name === "original");

/** Layers with their widths, and residuals; null where the record does not list them. */
function outlineOf(network) {
  const skeleton = data.skeletons[network.skeleton];
  return skeleton ? { layers: skeleton.layers.map(([name, kind], i) => ({ name, kind, cout: network.widths[i] })), residuals: skeleton.residuals } : null;
}

const plainName = (name) => name.replace(/#\d+$/, "").replace(/[^A-Za-z0-9]+/g, "_");
const within = (inner, outer) => inner === outer || inner.startsWith(`${outer}_`);
const related = (a, b) => within(a, b) || within(b, a);

/** The block that a residual goes around: what the names of its layers have in common, or the last of them. */
function blockOf(residual, layers) {
  const names = layers.slice(residual.from + 1, residual.to + 1).map((layer) => plainName(layer.name).split("_"));
  if (!names.length) return "";
  const common = names[0].filter((part, i) => names.every((name) => name.slice(0, i + 1).join("_") === names[0].slice(0, i + 1).join("_")));
  return common.join("_") || names.at(-1).join("_");
}

const bars = (rows, width, half, look) =>
  Plot.rect(rows.filter((row) => row[width]), { x1: 0, x2: width, y1: (row) => row.position - half, y2: (row) => row.position + half, ...look });

const FATES = {
  kept: { dash: null, width: 2 }, removed: { dash: "6 4", width: 2 }, merged: { dash: "2 3", width: 2 }, dropped: { dash: "1 6", width: 1.2 },
};

/** Residuals of the original with what became of each: kept, merged with its block's one convolution, removed, or dropped with its block. */
function fates(before, after, network) {
  const left = after.residuals.map((residual) => blockOf(residual, after.layers));
  const is = (names, block) => names.some((name) => related(plainName(name), block));
  return before.residuals.map((residual) => {
    const block = blockOf(residual, before.layers);
    const fate = is(left, block) ? "kept" : is(Object.keys(network.collapsed ?? {}), block) ? "merged"
      : is(after.layers.map((layer) => layer.name), block) ? "removed" : "dropped";
    return { ...residual, block, fate };
  });
}

const counted = (arcs) => d3.rollup(arcs, (found) => found.length, (arc) => arc.fate);
const saidOf = (counts) => [...counts].map(([fate, count]) => `${count} ${fate}`).join(", ") || "none";

/** Rows of the drawing: the original's layers with their widths before and after, and new layers of the rewrite after their block. */
function layerRows(before, after) {
  const left = new Map(after.layers.map((layer) => [plainName(layer.name), layer]));
  const old = new Set(before.layers.map((layer) => plainName(layer.name)));
  const rows = before.layers.map((layer) => ({ ...layer, before: layer.cout, after: left.get(plainName(layer.name))?.cout ?? 0 }));
  let place = 0;
  for (const layer of after.layers) {
    const name = plainName(layer.name);
    if (old.has(name)) {
      place = Math.max(place, rows.findIndex((row) => plainName(row.name) === name) + 1);
      continue;
    }
    const shares = rows.map((row) => shared(plainName(row.name), name)), most = d3.max(shares);
    if (most) place = Math.max(place, shares.lastIndexOf(most) + 1);
    rows.splice(place++, 0, { ...layer, before: 0, after: layer.cout, fresh: true });
  }
  return rows;
}

/** How many parts two names have in common from the left. */
function shared(a, b) {
  const [left, right] = [a.split("_"), b.split("_")], differ = left.findIndex((part, i) => part !== right[i]);
  return differ < 0 ? left.length : differ;
}

function drawLayers() {
  const network = data.networks[byId("network").value], figure = byId("drawing");
  const original = originalOf(network);
  const after = outlineOf(network), before = outlineOf(original);
  if (!after || !before) {
    figure.replaceChildren(...drawWithoutOutline(network), ...profileOf(network));
    return;
  }
  const rows = layerRows(before, after).map((row, position) => ({ ...row, position }));
  const position = new Map(rows.filter((row) => !row.fresh).map((row) => [row.name, row.position]));
  const where = (place) => (place < 0 ? -.5 : position.get(before.layers[place].name));
  const arcs = fates(before, after, network).map((arc) => ({ ...arc, y1: where(arc.from) + .15, y2: where(arc.to) - .15 }));
  const width = Math.max(300, figure.clientWidth), narrow = width < 560, fill = methods.get(network.method).fill;
  const longest = d3.max(rows, (row) => row.name.length), limit = narrow ? 15 : 34;
  const widest = d3.max(rows, (row) => Math.max(row.before, row.after));
  const short = (name) => (name.length > limit ? `…${name.slice(1 - limit)}` : name);
  const said = (row) => (row.fresh ? `${row.after} new` : row.after === row.before ? `${row.before}` : row.after ? `${row.before} → ${row.after}`
    : `${row.before} → ${Object.keys(network.collapsed ?? {}).some((block) => within(plainName(row.name), plainName(block))) ? "merged" : "gone"}`);
  const marginLeft = 14 + 6.4 * Math.min(longest, limit), marginRight = narrow ? 34 : 70, gap = narrow ? 60 : 90;
  const side = widest * (1 + gap / (width - marginLeft - marginRight - gap)); // where residuals are drawn, beside the widths' labels
  const svg = Plot.plot({
    width, height: 46 + ROW * rows.length, marginLeft, marginRight, marginTop: 30, marginBottom: 6,
    style: { ...STYLE, fontSize: "11px" },
    x: { domain: [0, side], axis: "top", label: "channels", ticks: d3.ticks(0, widest, narrow ? 3 : 6), labelAnchor: "left", labelArrow: "none" },
    y: { type: "linear", domain: [rows.length - .4, -.6], axis: null },
    marks: [
      Plot.text(rows, { y: "position", text: (row) => short(row.name), frameAnchor: "left", textAnchor: "end", dx: -7, fill: (row) => "currentColor" }),
      bars(rows, "before", .36, { fill: "var(--before)" }),
      bars(rows, "after", .22, { fill, title: (row) => `${row.name} (${row.kind}): ${said(row)}` }),
      Plot.text(rows, { x: (r) => Math.max(r.before, r.after), y: "position", text: said, textAnchor: "start", dx: 5, fill: "var(--soft)" }),
      ...Object.entries(FATES).map(([fate, { dash, width: strokeWidth }]) => Plot.arrow(arcs.filter((arc) => arc.fate === fate), {
        x1: side, x2: side, y1: "y1", y2: "y2", bend: narrow ? 50 : 62, headLength: fate === "kept" ? 7 : 0,
        stroke: fate === "dropped" ? "var(--soft)" : "currentColor", strokeDasharray: dash, strokeWidth, title: (arc) => `${arc.block}: residual ${fate}`,
      })),
    ],
  });
  svg.setAttribute("role", "img");
  const counts = counted(arcs);
  svg.setAttribute("aria-label", `${plural(rows.length, "layer")}; residuals: ${saidOf(counts)}`);
  figure.replaceChildren(layerKey(counts, fill), svg, ...reasons(network), ...profileOf(network));
}

/** Where the time goes, for a network that was measured with --profile. */
function profileOf({ profile }) {
  if (!profile) return [];
  const where = `${profile.backend}, ${plural(profile.threads, "thread")}, batch ${profile.batch_size}`;
  const text = (value) => h("td", { class: "text" }, value);
  const rows = profile.layers.map((row) => h("tr", {}, text(row.layer), text(row.operator), h("td", {}, row.cout ? `${row.cin} → ${row.cout}` : ""),
    h("td", {}, row.macs ? amount(row.macs) : ""), h("td", {}, three(row.ms)), h("td", {}, `${(100 * row.share).toFixed(1)} %`)));
  const head = ["layer", "operator", "channels", "MACs", "ms", "share"].map((name, i) => h("th", { scope: "col", class: i < 2 ? "text" : null }, name));
  const table = h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, rows));
  return [h("details", { class: "profile" }, h("summary", {}, `Where its time goes (${where})`),
    h("div", { class: "wide", role: "region", "aria-label": "Where its time goes", tabindex: "0" }, table))];
}

function layerKey(counts, fill) {
  const svg = (width, height) => d3.create("svg").attr("width", width).attr("height", height);
  const box = (colour) => svg(18, 10).call((g) => g.append("rect").attr("width", 18).attr("height", 10).attr("fill", colour)).node();
  const line = ({ dash, width }) => svg(28, 8).attr("stroke", "currentColor").attr("stroke-width", width).attr("stroke-dasharray", dash)
    .call((g) => g.append("line").attr("x2", 28).attr("y1", 4).attr("y2", 4)).node();
  return h("div", { class: "key" }, h("span", {}, box("var(--before)"), "channels before"), h("span", {}, box(fill), "channels after"),
    Object.entries(FATES).map(([fate, look]) => h("span", {}, line(look), `residual ${fate}: ${counts.get(fate) ?? 0}`)));
}

function reasons(network) {
  const kept = Object.entries(network.removal?.kept ?? {});
  if (!kept.length) return [];
  const list = h("ul", {}, kept.map(([name, reason]) => h("li", {}, `${name}: ${reason}`)));
  return [h("details", {}, h("summary", {}, `Why ${plural(kept.length, "residual")} stayed`), list)];
}

/** What an older record says of a network whose layers it does not list: the searched widths, the blocks and what became of them. */
function drawWithoutOutline(network) {
  const found = [h("p", { class: "note" }, "This run's record does not list layers (it was written by an older version); drawn is what it says.")];
  const groups = Array.isArray(network.search?.widths) ? network.search.widths : [];
  if (groups.length) {
    const rows = groups.map((group, position) => ({ ...group, position }));
    found.push(Plot.plot({
      width: Math.max(300, byId("drawing").clientWidth), height: 46 + ROW * rows.length, marginRight: 60,
      marginLeft: 14 + 6.4 * d3.max(rows, (row) => row.group.length), style: { ...STYLE, fontSize: "11px" },
      x: { axis: "top", label: "channels", labelArrow: "none" }, y: { type: "linear", domain: [rows.length - .4, -.6], axis: null },
      marks: [
        Plot.text(rows, { y: "position", text: "group", frameAnchor: "left", textAnchor: "end", dx: -7 }),
        bars(rows, "whole", .36, { fill: "var(--before)" }),
        bars(rows, "kept", .22, { fill: methods.get(network.method).fill }),
        Plot.text(rows, { x: "whole", y: "position", text: (r) => `${r.whole} → ${r.kept}`, textAnchor: "start", dx: 5, fill: "var(--soft)" }),
      ],
    }));
  }
  const blocks = new Map();
  for (const name of network.removal?.removed ?? []) blocks.set(plainName(name), "residual removed");
  for (const [name, reason] of Object.entries(network.removal?.kept ?? {})) blocks.set(plainName(name), `residual kept: ${reason}`);
  for (const [name, part] of Object.entries(network.collapsed ?? {}))
    blocks.set(plainName(name), `one convolution (${percent(part)} of the variance); ${blocks.get(plainName(name)) ?? "residual kept"}`);
  if (blocks.size) found.push(facts([...blocks]));
  return found;
}

// ---------------------------------------------------------------- curves

function drawCurves() {
  const run = data.runs[byId("run").value], figure = byId("training");
  const searched = data.networks.filter((network) => data.runs[network.run] === run && network.search?.episodes);
  byId("searches").hidden = !searched.length;
  const curves = Object.entries(run.training).map(([name, values]) => ({
    name, look: lookOf(name), epochs: values.map((value, i) => ({ name, epoch: i + 1, value: 100 * value })).filter(({ value }) => value),
  })).filter(({ epochs }) => epochs.length);
  const drawn = d3.sort(curves, ({ look }) => [...methods.values()].indexOf(look)).slice(0, data.at_once);
  const last = d3.max(drawn, ({ epochs }) => epochs.at(-1).epoch);
  figure.replaceChildren(h("h3", {}, "Validation accuracy while training"), ...(drawn.length ? [
    h("div", { class: "key" }, drawn.map(({ name, look }) => h("span", {}, sign(look), name))),
    Plot.plot({
      width: Math.max(300, figure.clientWidth), height: 300, marginLeft: 44, style: STYLE,
      x: { label: "epoch", labelAnchor: "center", ticks: d3.ticks(1, last, 6).filter(Number.isInteger), tickFormat: "d", labelArrow: "none" },
      y: { label: "validation accuracy (%)", grid: true, labelArrow: "none" },
      marks: drawn.flatMap(({ look, epochs }) => [
        Plot.line(epochs, { x: "epoch", y: "value", stroke: look.fill, strokeWidth: 1.7 }),
        Plot.dot(epochs, { x: "epoch", y: "value", fill: look.fill, symbol: look.symbol, r: 3, title: (e) => `${e.name}, epoch ${e.epoch}: ${e.value.toFixed(2)} %` }),
      ]),
    }),
  ] : [h("p", { class: "note" }, "This run's record holds no training curves.")]),
  ...(drawn.length < curves.length ? [h("p", { class: "note" }, `Drawn: ${drawn.length} of ${curves.length} trainings.`)] : []));
  byId("searches").replaceChildren(...searched.map(drawSearch));
}

/** A training is called after its method, or after it and the candidate that it chose. */
function lookOf(training) {
  const method = d3.greatest([...methods.keys()].filter((name) => training === name || training.startsWith(`${name}-`)), (name) => name.length);
  return methods.get(method) ?? { fill: "var(--soft)", symbol: d3.symbolCircle };
}

function drawSearch(network) {
  const { reward, source } = network.search.episodes, fill = methods.get(network.method).fill;
  const episodes = reward.map((value, i) => ({ episode: i + 1, value, source: source[i], best: d3.max(reward.slice(0, i + 1)) }));
  const kinds = [...new Set(source)], symbols = [d3.symbolCircle, SYMBOLS.times, d3.symbolTriangle, d3.symbolSquare, d3.symbolDiamond];
  const symbolOf = (kind) => symbols[kinds.indexOf(kind) % symbols.length];
  const dots = (kind) => Plot.dot(episodes.filter((e) => e.source === kind),
    { x: "episode", y: "value", fill, symbol: symbolOf(kind), r: 3, title: (e) => `episode ${e.episode}, ${kind}: ${e.value}` });
  return h("figure", {}, h("h3", {}, `Search of ${label(network.method, network.budget)}`),
    h("div", { class: "key" }, kinds.map((kind) => h("span", {}, sign({ fill, symbol: symbolOf(kind) }), kind)), h("span", {}, "line: best so far")),
    Plot.plot({
      width: Math.max(300, byId("training").clientWidth), height: 220, marginLeft: 44, style: STYLE,
      x: { label: "episode", labelAnchor: "center", labelArrow: "none" }, y: { label: "reward", grid: true, labelArrow: "none" },
      marks: [Plot.line(episodes, { x: "episode", y: "best", curve: "step-after", stroke: "currentColor" }), ...kinds.map(dots)],
    }));
}

// ---------------------------------------------------------------- what does not change

function drawErrors() {
  const seen = new Set(), rows = [];
  for (const network of data.networks) {
    const { removal } = network, run = data.runs[network.run], key = JSON.stringify([removal, network.method, run.seed, network.group]);
    if (!removal || seen.has(key)) continue;
    seen.add(key);
    const kept = Object.values(removal.kept), error = (removal.max_error ?? NaN).toExponential(1);
    const cells = [label(network.method, network.budget), run.name, String(removal.removed.length), String(kept.length), error, [...new Set(kept)].join("; ")];
    rows.push(h("tr", {}, cells.map((text, i) => h("td", { class: ["", "text", "", "", "", "reasons"][i] }, text))));
  }
  byId("exactness").hidden = !rows.length;
  const head = ["network", "run", "removed", "kept", "largest error", "why kept"].map((text, i) => h("th", { scope: "col", class: i === 1 || i === 5 ? "text" : null }, text));
  byId("errors").replaceChildren(h("thead", {}, h("tr", {}, head)), h("tbody", {}, rows));
}

function drawRest() {
  const seeds = new Set(data.runs.map((run) => run.seed));
  byId("summary").textContent = `${data.groups.join("; ")}. ${plural(data.runs.length, "record")}, ${plural(data.methods.length, "method")}, `
    + `${plural(seeds.size, "seed")}, ${plural(data.places.length, "place")} of measuring.`;
  byId("reading").textContent = "A point is the mean over seeds. Vertical bars go from the lowest to the highest seed, horizontal ones from the first to the third "
    + "quartile of the measured time. Thin lines join the budgets of a method; the grey steps are the front, the networks that no other beats in both. "
    + "Dotted: the dense network. Ratios are against the dense network measured in the same process.";
  byId("apart").hidden = !data.apart;
  byId("left-out").hidden = !data.left_out.length;
  byId("left-out").querySelector("ul").replaceChildren(...data.left_out.map((text) => h("li", {}, text)));
  byId("machines").replaceChildren(...[...new Set(data.runs.map((run) => run.machine))].map((text) => h("li", {}, text)));
  const commands = data.runs.map((run) => [h("p", {}, `${label(run.name, run.budget)}, seed ${run.seed}`), h("pre", {}, h("code", {}, run.command))]);
  byId("commands").replaceChildren(h("details", {}, h("summary", {}, `Commands of ${plural(data.runs.length, "record")}`), commands));
  byId("command").textContent = data.command;
  const option = ([network, number]) =>
    h("option", { value: number }, `${label(network.method, network.budget)}, seed ${network.seed} (${data.runs[network.run].name})`);
  byId("network").replaceChildren(...data.groups.map((title, group) => h("optgroup", { label: title },
    data.networks.map((network, number) => [network, number]).filter(([network]) => network.group === group && network.name !== "original").map(option))));
  byId("run").replaceChildren(...data.runs.map((run, number) => h("option", { value: number }, run.name)));
  byId("network").addEventListener("change", drawLayers);
  byId("run").addEventListener("change", drawCurves);
  const first = data.networks.findIndex((network) => network.group === state.group && !["original", "plain"].includes(network.name));
  if (first >= 0) byId("network").value = first;
  drawErrors();
}

function draw() {
  drawControls();
  drawMethods();
  drawChart();
  drawDetails();
  drawTable();
}

drawRest();
draw();
drawLayers();
drawCurves();
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawChart(); drawLayers(); drawCurves(); } });
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((element) => { element.open = true; }));
document.documentElement.dataset.ready = "";
