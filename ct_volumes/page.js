// What report.html does: its list, its viewer and its overview, from the data that page.py wrote there.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const [slices, rows, columns] = data.shape, [rowMm, columnMm] = data.spacing;
const WINDOWS = {"soft tissue": [-160, 240], lung: [-1350, 150], bone: [-500, 1300], liver: [15, 165]};
const COLUMNS = [
  ["#", l => l.number, l => l.number], ["Score", l => l.score, l => l.score.toFixed(3)],
  ["Long × short, mm", l => l.long, l => `${l.long.toFixed(1)} × ${l.short.toFixed(1)}`],
  ["Volume", l => l.volume, l => volume(l.volume)], ["Slices", l => l.first, l => `${l.first}–${l.last}`], ["Position", l => -l.position[2], l => place(l.position)],
];
// What is shown. `at` counts the slices of the lesion's crop; without a `name` the window is dragged.
const now = {lesion: null, at: 0, name: null, low: 0, high: 1, picked: false, mask: true, recist: true, least: 0, column: 1, down: true};
let shown = [], stack = null;

// Everything is made of nodes and text: nothing in the data can become markup.
function make(name, attributes = {}, ...children) { return fill(document.createElement(name), attributes, children); }
function draw(name, attributes, ...children) { return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children); }
function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
const volume = mm3 => mm3 < 1000 ? `${mm3 < 100 ? mm3.toFixed(1) : Math.round(mm3)} mm³` : `${(mm3 / 1000).toFixed(1)} ml`;
const place = ([x, y, z]) => [[x, "L", "R"], [y, "P", "A"], [z, "S", "I"]].map(([mm, over, under]) => `${mm < 0 ? under : over}${Math.abs(mm).toFixed(0)}`).join(" ");

// The stack of a view: what `pack` of ct_volumes/page.py does, backwards.
const unpacked = new Map();
function unpack(id, width, height) {
  if (!unpacked.has(id)) unpacked.set(id, inflate(id).then(bytes => {
    const count = bytes.length / 2, hu = new Int16Array(count);
    for (let i = 0, x = 0, y = 0; i < count; i++) {
      const folded = bytes[i] | bytes[count + i] << 8, a = x ? hu[i - 1] : 0, b = y ? hu[i - width] : 0;
      let guess = x ? a : b;
      if (x && y) { const low = a < b ? a : b, high = a < b ? b : a, slope = a + b - hu[i - width - 1]; guess = slope < low ? low : slope > high ? high : slope; }
      hu[i] = guess + (folded >> 1 ^ -(folded & 1));
      if (++x === width) { x = 0; if (++y === height) y = 0; }
    }
    return hu;
  }));
  return unpacked.get(id);
}
const unpackLesion = lesion => lesion && Promise.all([unpack(`crop-${lesion.number - 1}`, lesion.crop.width, lesion.crop.height), unpack(`whole-${lesion.best}`, data.whole[1], data.whole[0])]);
async function inflate(id) {
  if (!window.DecompressionStream) throw new Error("This browser is too old to show the slices: it takes Chrome or Edge 80, Firefox 113, Safari 16.4, or later.");
  const bytes = Uint8Array.from(atob(byId(id).textContent), c => c.charCodeAt(0));
  return new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer());
}
function paint(canvas, hu, from, width, height) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, {width, height});
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  const grey = new Uint32Array(image.data.buffer), scale = 255 / (now.high - now.low);
  for (let i = 0; i < grey.length; i++) {
    const value = Math.min(Math.max(Math.round((hu[from + i] - now.low) * scale), 0), 255);
    grey[i] = 0xff000000 | value << 16 | value << 8 | value;
  }
  context.putImageData(image, 0, 0);
}

async function show(lesion, slice = lesion.measured) {
  const {crop} = lesion;
  now.lesion = lesion;
  now.at = nearest(crop.slices, slice);
  if (!now.picked) setWindow(lesion.window);
  for (const row of byId("rows").children) {
    const chosen = +row.dataset.number === lesion.number;
    chosen ? row.setAttribute("aria-current", "true") : row.removeAttribute("aria-current");
    if (chosen) bringIntoList(row);
  }
  byId("view").style.setProperty("--aspect", crop.width * columnMm / (crop.height * rowMm));
  byId("marks").setAttribute("viewBox", [crop.x - crop.stride / 2, crop.y - crop.stride / 2, crop.width * crop.stride, crop.height * crop.stride].join(" "));
  byId("strip").replaceChildren(...crop.slices.map((index, at) => {
    const own = lesion.slices[index - lesion.first], bar = make("i", {"data-at": at});
    if (own) own[0] === null ? bar.classList.add("interpolated") : bar.style.setProperty("--part", `${20 + 80 * own[0]}%`);
    bar.classList.toggle("measured", index === lesion.measured);
    return bar;
  }));
  byId("slice").max = crop.slices.length - 1;
  byId("thinned").textContent = [crop.every > 1 && `of this lesion about every ${ordinal(crop.every)} slice is in the page`, crop.stride > 1 && `every ${ordinal(crop.stride)} pixel`].filter(Boolean).join(", ");
  stack = null;
  for (const id of ["picture", "whole"]) byId(id).width = byId(id).width; // nothing of another lesion
  drawOverview();
  render();
  try {
    const [hu, whole] = await unpackLesion(lesion);
    if (now.lesion !== lesion) return;
    stack = {hu, whole};
    render();
    for (const by of [1, -1]) await unpackLesion(shown[shown.indexOf(lesion) + by]); // the next key shows it at once
  } catch (error) { byId("caution").textContent = error.message; }
}
// Of the list alone: the page itself stays where it is.
function bringIntoList(row) {
  const box = byId("scroll"), top = row.offsetTop - byId("columns").offsetHeight, bottom = row.offsetTop + row.offsetHeight - box.clientHeight;
  if (box.scrollTop > top) box.scrollTop = top; else if (box.scrollTop < bottom) box.scrollTop = bottom;
}
const ordinal = n => n === 2 ? "second" : n === 3 ? "third" : `${n}th`;
const nearest = (list, wanted) => list.reduce((best, value, i) => Math.abs(value - wanted) < Math.abs(list[best] - wanted) ? i : best, 0);

function render() {
  const {lesion} = now;
  if (!lesion) return;
  const {crop} = lesion, index = crop.slices[now.at], own = lesion.slices[index - lesion.first];
  if (stack) {
    paint(byId("picture"), stack.hu, now.at * crop.width * crop.height, crop.width, crop.height);
    paint(byId("whole"), stack.whole, 0, data.whole[1], data.whole[0]);
  }
  const marks = [], lengths = [];
  if (now.mask) {
    for (const other of shown) {
      const part = other !== lesion && other.slices[index - other.first];
      if (part) marks.push(outline(part, "other"));
    }
    if (own) marks.push(outline(own, own[0] === null ? "interpolated" : "detected"));
  }
  if (now.recist && index === lesion.measured) {
    const [a, b, c, d] = lesion.recist;
    marks.push(draw("path", {class: "axis", d: `M${a}L${b}M${c}L${d}`}));
    lengths.push(label(lesion.long, a, b, [c, d]), label(lesion.short, c, d, [a, b]));
  }
  byId("marks").replaceChildren(...marks);
  byId("lengths").replaceChildren(...lengths);
  const kind = !own ? "outside the lesion" : own[0] === null ? "interpolated" : `score ${own[0].toFixed(3)}`;
  byId("nw").replaceChildren(make("b", {}, `Lesion ${lesion.number}`), `\nscore ${lesion.score.toFixed(3)}\n${lesion.long.toFixed(1)} × ${lesion.short.toFixed(1)} mm\n${volume(lesion.volume)}`);
  byId("ne").replaceChildren(`slice ${index} of 0–${slices - 1}\n`, make("b", {}, kind), index === lesion.measured ? "\nmeasured here" : "");
  const width = now.high - now.low, level = (now.high + now.low) / 2;
  byId("sw").textContent = `${now.name ?? "own window"}\nW ${Math.round(width)} L ${Math.round(level)}`;
  drawRuler(crop);
  for (const bar of byId("strip").children) bar.classList.toggle("here", +bar.dataset.at === now.at);
  byId("slice").value = now.at;
  byId("slice").setAttribute("aria-valuetext", `slice ${index}, ${kind}`);
  for (const button of byId("presets").children) button.setAttribute("aria-pressed", button.dataset.name === now.name);
  for (const name of ["mask", "recist"]) byId(name).setAttribute("aria-pressed", now[name]);
  const text = `Lesion ${lesion.number}, slice ${index}, ${kind}, ${now.name ?? "own"} window`;
  byId("view").setAttribute("aria-label", text);
  byId("status").textContent = text;
  // Whoever drives the page from a script reads here what it shows.
  Object.assign(byId("view").dataset, {lesion: lesion.number, slice: index, window: now.name ?? "", width, level, ready: Boolean(stack)});
  for (const line of document.querySelectorAll(".level")) {
    const y = data.projections[line.ownerSVGElement.id].levels[index];
    line.setAttribute("y1", y); line.setAttribute("y2", y);
  }
}
const outline = (part, kind) => draw("path", {class: `outline ${kind}`, d: part[1], transform: "scale(.5)"});
// A length stands beyond that end of its axis which is farther from the other axis' ends.
function label(mm, from, to, others) {
  const {crop} = now.lesion, far = point => Math.min(...others.map(o => Math.hypot(o[0] - point[0], o[1] - point[1])));
  const [end, start] = far(to) >= far(from) ? [to, from] : [from, to], length = Math.hypot(end[0] - start[0], end[1] - start[1]) || 1;
  const part = axis => (end[axis] - (axis ? crop.y : crop.x) + crop.stride / 2) / ((axis ? crop.height : crop.width) * crop.stride) * 100;
  const away = axis => (end[axis] - start[axis]) / length;
  return make("span", {class: "length", style: `left: clamp(2rem, calc(${part(0)}% + ${away(0) * 40}px), calc(100% - 2rem)); top: clamp(1rem, calc(${part(1)}% + ${away(1) * 20}px), calc(100% - 1rem))`}, `${mm.toFixed(1)} mm`);
}
function drawRuler(crop) {
  const field = crop.width * crop.stride * columnMm, mm = [100, 50, 20, 10, 5, 2, 1].find(step => step <= field / 4) ?? 1;
  const ruler = make("span", {class: "ruler", style: `width: ${mm / field * byId("view").clientWidth}px`});
  byId("se").replaceChildren(make("span", {id: "probe"}), `${mm} mm\n`, ruler);
}

function setWindow(name) { [now.low, now.high] = WINDOWS[name]; now.name = name; }
function pick(name) { setWindow(name); now.picked = true; render(); }
function scroll(by) { goTo(now.at + by); }
function goTo(at) { now.at = Math.min(Math.max(at, 0), now.lesion.crop.slices.length - 1); render(); }
function step(by) {
  const next = shown[shown.indexOf(now.lesion) + by];
  if (next) show(next);
}
function toggle(name) { now[name] = !now[name]; render(); }

function list() {
  const [, key] = COLUMNS[now.column];
  shown = data.lesions.filter(l => l.score >= now.least).sort((a, b) => (now.down ? key(b) - key(a) : key(a) - key(b)) || a.number - b.number);
  byId("columns").replaceChildren(...COLUMNS.map(([name], i) => {
    const button = make("button", {type: "button"}, name), head = make("th", {scope: "col"}, button);
    if (i === now.column) head.setAttribute("aria-sort", now.down ? "descending" : "ascending");
    button.addEventListener("click", () => { now.down = i === now.column ? !now.down : i > 0 && i < 4; now.column = i; list(); byId("columns").children[i].firstChild.focus(); });
    return head;
  }));
  byId("rows").replaceChildren(...shown.map(lesion => {
    const row = make("tr", {"data-number": lesion.number}, ...COLUMNS.map(([, , text], i) => make("td", {}, i ? text(lesion) : make("button", {type: "button", "aria-label": `Lesion ${lesion.number}`}, text(lesion)))));
    row.children[1].className = "score";
    row.children[1].style.setProperty("--part", `${lesion.score * 100}%`);
    row.addEventListener("click", () => show(lesion));
    if (lesion === now.lesion) row.setAttribute("aria-current", "true");
    return row;
  }));
  byId("left").textContent = `${now.least.toFixed(2)}: ${shown.length} of ${data.lesions.length}`;
  byId("viewer").hidden = !shown.length;
  byId("nothing").hidden = Boolean(shown.length);
  if (!shown.length) now.lesion = null, drawOverview();
  else if (!shown.includes(now.lesion)) show(shown[0]);
  else drawOverview(), render();
}

function drawOverview() {
  for (const [name, view] of Object.entries(data.projections)) {
    const svg = byId(name);
    if (!svg) continue;
    const marks = shown.filter(l => l !== now.lesion).reverse();
    if (now.lesion) marks.push(now.lesion);
    svg.replaceChildren(...now.lesion ? [draw("line", {class: "level", x1: 0, x2: view.w})] : [], ...marks.flatMap(lesion => {
      // Never so small that it could not be hit.
      const {box: [x1, y1, x2, y2], centre: [cx, cy]} = lesion.marks[name], least = view.w / 40;
      const rx = Math.max((x2 - x1) / 2, least / 2) + 2, ry = Math.max((y2 - y1) / 2, least / 2) + 2, x = (x1 + x2) / 2, y = (y1 + y2) / 2;
      const chosen = lesion === now.lesion;
      const mark = draw("rect", {class: `mark${chosen ? " chosen" : ""}`, x: x - rx, y: y - ry, width: 2 * rx, height: 2 * ry, rx: 3, "data-number": lesion.number, "data-centre": `${cx} ${cy}`}, draw("title", {}, `Lesion ${lesion.number}, score ${lesion.score.toFixed(3)}`));
      mark.addEventListener("click", () => show(lesion));
      return chosen || shown.length <= 12 ? [mark, draw("text", {class: "tag", x, y: y - ry - view.w / 80, "font-size": view.w / 24}, lesion.number)] : [mark];
    }));
  }
  const field = byId("field");
  if (!field || !now.lesion) return;
  const {crop, box: [x1, y1, , x2, y2], best} = now.lesion;
  field.replaceChildren(draw("rect", {class: "field", x: crop.x - .5, y: crop.y - .5, width: crop.width * crop.stride, height: crop.height * crop.stride}), draw("rect", {class: "place", x: x1, y: y1, width: x2 - x1, height: y2 - y1}));
  byId("of-whole").textContent = `Slice ${best}, that of the highest score; blue: what the viewer shows`;
}

function begin() {
  const count = data.lesions.length, told = Object.fromEntries(data.scan), [[, algorithm], [, version]] = data.algorithm;
  byId("heading").textContent = count ? `${count} lesion${count > 1 ? "s" : ""}` : "No lesions found";
  byId("summary").textContent = [`Found by ${algorithm}, version ${version}`, `${slices} slices of ${columns} × ${rows} pixels, ${told.Pixel}`, told.Interval && `interval ${told.Interval}`].filter(Boolean).join(" · ");
  byId("caution").replaceChildren(...data.scan.filter(([name]) => name === "Note").map(([, note]) => make("div", {}, note)));
  byId("details").replaceChildren(...[...data.scan, ...data.algorithm].flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  byId("presets").replaceChildren(...Object.entries(WINDOWS).map(([name, [low, high]], i) => {
    const button = make("button", {type: "button", "data-name": name, title: `${low} to ${high} HU`}, make("kbd", {}, String(i + 1)), ` ${name[0].toUpperCase()}${name.slice(1)}`);
    button.addEventListener("click", () => pick(name));
    return button;
  }));
  const figure = (caption, id, aspect, picture, mark, sides) => make("figure", {}, make("figcaption", {id: `of-${id}`}, caption), make("div", {class: "picture", style: `aspect-ratio: ${aspect}`}, picture, mark, make("span", {class: "side", style: "left: 0", "aria-hidden": "true"}, sides[0]), make("span", {class: "side", style: "right: 0", "aria-hidden": "true"}, sides[1])));
  const figures = [];
  if (count) figures.push(figure("", "whole", columns * columnMm / (rows * rowMm), make("canvas", {id: "whole"}), draw("svg", {id: "field", viewBox: `-.5 -.5 ${columns} ${rows}`, preserveAspectRatio: "none"}), "RL"));
  for (const [name, view] of Object.entries(data.projections))
    figures.push(figure(`${name[0].toUpperCase()}${name.slice(1)} maximum intensity${count ? "; click a lesion" : ""}`, `of-${name}`, view.w / view.h, make("img", {src: `data:image/png;base64,${view.png}`, alt: `${name} projection of the scan`}), draw("svg", {id: name, viewBox: `0 0 ${view.w} ${view.h}`}), name === "coronal" ? "RL" : "AP"));
  byId("figures").replaceChildren(...figures);
  byId("nothing").textContent = count ? "No lesion has so high a score. Move the slider to the left." : "The detector found no lesions in this scan at the thresholds it ran with (see “Scan and algorithm” above).";
  document.body.classList.toggle("empty", !count);
  byId("list").hidden = !count;
  list();
  fromAddress();
}
// report.html#lesion=3&slice=120&window=lung opens that; all three are optional.
function fromAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1)), lesion = data.lesions.find(l => l.number === +wanted.get("lesion")) ?? now.lesion;
  if (!lesion) return;
  if (wanted.get("window") in WINDOWS) { setWindow(wanted.get("window")); now.picked = true; }
  if (location.hash) show(lesion, wanted.has("slice") ? +wanted.get("slice") : lesion.measured);
}
window.addEventListener("hashchange", fromAddress);
window.addEventListener("resize", render);

const KEYS = {
  j: () => step(1), k: () => step(-1), ArrowRight: () => step(1), ArrowLeft: () => step(-1), ArrowUp: () => scroll(-1), ArrowDown: () => scroll(1),
  m: () => toggle("mask"), r: () => toggle("recist"), b: () => show(now.lesion, now.lesion.measured),
  ...Object.fromEntries(Object.keys(WINDOWS).map((name, i) => [i + 1, () => pick(name)])),
};
document.addEventListener("keydown", event => {
  const slider = event.target.type === "range" ? event.target.id : "";
  if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, event.key) || !now.lesion) return;
  // Sliders keep their own arrows; but up is towards the head on the slices' one as everywhere.
  if (event.key.startsWith("Arrow") && (slider === "least" || slider === "slice" && /Left|Right/.test(event.key))) return;
  event.preventDefault();
  KEYS[event.key]();
});
byId("slice").addEventListener("input", event => goTo(+event.target.value));
byId("least").addEventListener("input", event => { now.least = +event.target.value; list(); });
byId("strip").addEventListener("click", event => { const bar = event.target.closest("i"); if (bar) goTo(+bar.dataset.at); });
for (const name of ["mask", "recist"]) byId(name).addEventListener("click", () => toggle(name));
const view = byId("view");
// A slider that was drawn with the mouse does not keep the keys.
for (const id of ["slice", "least"]) byId(id).addEventListener("pointerup", () => view.focus({preventScroll: true}));
let turned = 0, held = null;
view.addEventListener("wheel", event => {
  if (event.ctrlKey) return;
  event.preventDefault();
  // A wheel turns by 100 or more at a time, a touchpad by a few.
  turned += event.deltaMode ? Math.sign(event.deltaY) * 100 : event.deltaY;
  const steps = Math.trunc(turned / 50);
  if (steps) { turned = 0; scroll(Math.sign(steps)); }
}, {passive: false});
view.addEventListener("pointerdown", event => {
  if (event.button) return;
  held = {at: now.at, x: event.clientX, y: event.clientY, width: now.high - now.low, level: (now.high + now.low) / 2};
  view.setPointerCapture(event.pointerId);
});
view.addEventListener("pointermove", event => {
  // A finger scrolls; it has no wheel.
  if (held && event.pointerType === "touch") return goTo(held.at + Math.round((event.clientY - held.y) / 12));
  if (held && Math.hypot(event.clientX - held.x, event.clientY - held.y) > 3 || held?.moved) {
    held.moved = true;
    // Across the view the width doubles or halves; the level goes along with the width it has.
    const width = Math.min(Math.max(held.width * 2 ** (2 * (event.clientX - held.x) / view.clientWidth), 2), 8000);
    const level = held.level + (event.clientY - held.y) / view.clientHeight * held.width;
    Object.assign(now, {low: level - width / 2, high: level + width / 2, name: null, picked: true});
    render();
  }
  probe(event);
});
for (const name of ["pointerup", "pointercancel"]) view.addEventListener(name, () => { held = null; });
view.addEventListener("pointerleave", () => { byId("probe")?.replaceChildren(); });
function probe(event) {
  if (!stack || !now.lesion) return;
  const {crop} = now.lesion, frame = view.getBoundingClientRect();
  const x = Math.floor((event.clientX - frame.left) / frame.width * crop.width), y = Math.floor((event.clientY - frame.top) / frame.height * crop.height);
  if (x < 0 || y < 0 || x >= crop.width || y >= crop.height) return;
  byId("probe").textContent = `${stack.hu[(now.at * crop.height + y) * crop.width + x]} HU at ${crop.x + x * crop.stride}, ${crop.y + y * crop.stride}\n`;
}
begin();
