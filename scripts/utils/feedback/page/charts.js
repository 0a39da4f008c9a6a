// Small charts as SVG: drawn at the width they have, with a text for those who do not see them.
import { el, svg } from "./dom.js";
import { moment, number, percent, t } from "./words.js";

const HEIGHT = 180;
const EDGE = { top: 12, right: 16, bottom: 26, left: 44 };

/** A figure whose `draw(width)` gives the SVG's children; drawn again when its width changes. */
function figure({ title, text, table = null, height = HEIGHT, heading = "h2", draw }) {
  const drawing = svg("svg", { role: "img", "aria-label": `${title}. ${text}`, height });
  const node = el(
    "figure",
    { class: "chart card" },
    el("figcaption", {}, el(heading, {}, title), el("p", { class: "muted small" }, text)),
    el("div", { class: "canvas" }, drawing),
    table && el("details", { class: "muted small" }, el("summary", {}, t("look.table")), table),
  );
  let drawn = 0;
  new ResizeObserver(([{ contentRect }]) => {
    const width = Math.floor(contentRect.width);
    if (width === drawn || width < 1) return;
    drawn = width;
    drawing.setAttribute("width", width);
    drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    drawing.replaceChildren(...draw(width));
  }).observe(node.querySelector(".canvas"));
  return node;
}

/** About `count` round numbers from `low` to `high`. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, index) =>
    Number(((first + index) * step).toPrecision(12)),
  );
}

const scale = (low, high, from, to) => (value) => from + ((value - low) / (high - low || 1)) * (to - from);

const label = (x, y, words, attributes = {}) => svg("text", { x, y, ...attributes }, words);

function range(values, { zero = false } = {}) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (zero) low = Math.min(low, 0);
  if (low === high) [low, high] = [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2];
  return [low, high];
}

/** The range widened to the next round numbers. */
function rounded([low, high], count) {
  const marks = ticks(low, high, count);
  const step = marks.length > 1 ? marks[1] - marks[0] : high - low;
  return [Math.floor(low / step + 1e-9) * step, Math.ceil(high / step - 1e-9) * step];
}

/** A table with a heading; wide ones scroll, and the keyboard reaches them. */
export function table(caption, heads, rows) {
  return el(
    "div",
    { class: "scrolls", tabindex: 0, role: "region", "aria-label": caption },
    el(
      "table",
      {},
      el("caption", { class: "sr" }, caption),
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          heads.map((words) => el("th", { scope: "col" }, words)),
        ),
      ),
      el(
        "tbody",
        {},
        rows.map(([first, ...rest]) =>
          el(
            "tr",
            {},
            el("th", { scope: "row", dir: "auto" }, first),
            rest.map((cell) => el("td", {}, cell)),
          ),
        ),
      ),
    ),
  );
}

/** A line through [[x, y], ...]; `time`: x is in seconds since 1970; `steps`: y stays until the next point. */
export function lineChart({
  title,
  text,
  points,
  axis,
  time = false,
  steps = false,
  height = HEIGHT,
  heading = "h2",
}) {
  const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
  const [left, right] = range(xs);
  const [low, high] = rounded(range(ys, { zero: steps }), 3);
  const draw = (width) => {
    const x = scale(left, right, EDGE.left, width - EDGE.right);
    const y = scale(low, high, height - EDGE.bottom, EDGE.top);
    const grid = ticks(low, high, 3).map((value) =>
      svg(
        "g",
        {},
        svg("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(value), y2: y(value) }),
        label(EDGE.left - 8, y(value) + 4, number(value), { "text-anchor": "end" }),
      ),
    );
    const path = points
      .map(([px, py], index) => {
        if (!index) return `M${x(px)} ${y(py)}`;
        return steps ? `H${x(px)}V${y(py)}` : `L${x(px)} ${y(py)}`;
      })
      .join("");
    const end = points.at(-1);
    return [
      ...grid,
      svg("path", { class: "line", d: path }),
      svg("circle", { class: "dot", cx: x(end[0]), cy: y(end[1]), r: 4 }),
      ...ends(xs, width, height, time),
    ];
  };
  const shown = (value) => (time ? moment(value) : number(value));
  return figure({
    title,
    text,
    height,
    heading,
    draw,
    table: table(
      title,
      [axis, title],
      thinned(points).map(([px, py]) => [shown(px), number(py)]),
    ),
  });
}

/** The first and the last x below the chart. */
function ends(xs, width, height, time) {
  const shown = (value) => (time ? moment(value) : number(value));
  const baseline = height - 6;
  const last = label(width - EDGE.right, baseline, shown(xs.at(-1)), { "text-anchor": "end" });
  return xs.length < 2 ? [last] : [label(EDGE.left, baseline, shown(xs[0])), last];
}

/** At most 20 points of a curve, with its first and last. */
function thinned(points) {
  const every = Math.ceil(points.length / 20);
  return points.filter((_, index) => index % every === 0 || index === points.length - 1);
}

/** Shares with their intervals, a row each: [{name, value, low, high}]. */
export function intervalChart({ title, text, rows, table: values }) {
  const step = 44;
  const height = rows.length * step + EDGE.bottom + 8;
  const draw = (width) => {
    const x = scale(0, 1, EDGE.right, width - EDGE.right);
    const grid = [0, 0.25, 0.5, 0.75, 1].map((share) =>
      svg(
        "g",
        {},
        svg("line", {
          class: share === 0.5 ? "grid half" : "grid",
          x1: x(share),
          x2: x(share),
          y1: 4,
          y2: height - EDGE.bottom,
        }),
        label(x(share), height - 6, percent(share), {
          "text-anchor": share === 0 ? "start" : share === 1 ? "end" : "middle",
        }),
      ),
    );
    const marks = rows.map(({ name, value, low, high }, index) => {
      const y = index * step + 34;
      return svg(
        "g",
        {},
        label(x(0), y - 12, name, { class: "name" }),
        svg("line", { class: "whisker", x1: x(low), x2: x(high), y1: y, y2: y }),
        svg("circle", { class: "dot", cx: x(value), cy: y, r: 6 }),
      );
    });
    return [...grid, ...marks];
  };
  return figure({ title, text, height, draw, table: values });
}
