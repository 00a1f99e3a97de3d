/**
 * Small charts in SVG: bars and steps over time, drawn again whenever their data changes.
 *
 * The colours come from the classes in control.css, so they follow the theme by themselves.
 */

const SVG = "http://www.w3.org/2000/svg";
const AXIS = { left: 40, right: 8, top: 8, bottom: 20 };

/** @param {string} tag @param {Record<string, string | number>} attributes */
function svg(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** Return a round number of at least `value`, for the top of an axis. */
export function niceCeiling(value) {
  if (value <= 4) return 4;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * power).find((step) => step >= value);
}

export class Chart {
  /**
   * @param {HTMLElement} place
   * @param {{kind: "bars" | "steps", label: string, most?: number,
   *          tick?: (x: number) => string}} options
   *   `most`: the top of the axis, else the highest value decides.
   */
  constructor(place, options) {
    this.place = place;
    this.options = { tick: (x) => `${x} s`, ...options };
    this.data = { points: [], from: 0, to: 1 };
    new ResizeObserver(() => this.draw()).observe(place);
  }

  /** @param {{points: [number, number][], from: number, to: number}} data by ascending x */
  show(data) {
    this.data = data;
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.place;
    if (!width || !height) return;
    const { points, from, to } = this.data;
    const highest = points.reduce((most, [, y]) => Math.max(most, y), 0);
    const top = this.options.most ?? niceCeiling(highest);
    const wide = width - AXIS.left - AXIS.right;
    const high = height - AXIS.top - AXIS.bottom;
    const x = (value) => AXIS.left + ((value - from) / (to - from || 1)) * wide;
    const y = (value) => AXIS.top + (1 - value / (top || 1)) * high;

    const image = svg("svg", {
      viewBox: `0 0 ${width} ${height}`,
      width,
      height,
      role: "img",
      "aria-label": `${this.options.label}: highest ${highest.toLocaleString("en")}`,
    });
    for (const part of [0, 0.5, 1]) {
      const at = y(top * part);
      image.append(
        svg("line", { x1: AXIS.left, x2: width - AXIS.right, y1: at, y2: at, class: "control-grid" }),
        svg("text", { x: AXIS.left - 6, y: at + 4, "text-anchor": "end" }, short(top * part)),
      );
    }
    for (const part of [0, 0.5, 1]) {
      const anchor = part === 0 ? "start" : part === 1 ? "end" : "middle";
      const value = from + (to - from) * part;
      const place = { x: x(value), y: height - 4, "text-anchor": anchor };
      image.append(svg("text", place, this.options.tick(value)));
    }
    image.append(...(this.options.kind === "bars" ? bars(points, x, y, from, to, wide) : steps(points, x, y, to)));
    this.place.replaceChildren(image);
  }
}

function short(value) {
  return value >= 10_000 ? `${Math.round(value / 100) / 10}k` : String(Math.round(value * 10) / 10);
}

/** One bar per second; where seconds are narrower than a pixel, the highest of each pixel. */
function bars(points, x, y, from, to, wide) {
  const width = Math.max(1, wide / (to - from || 1));
  const highest = new Map();
  for (const [at, value] of points) {
    if (at < from || at > to || !value) continue;
    const left = Math.floor(x(at));
    highest.set(left, Math.max(value, highest.get(left) ?? 0));
  }
  const gap = width > 3 ? 1 : 0;
  const path = [...highest]
    .map(([left, value]) => `M${left} ${y(0)}V${y(value)}h${Math.max(1, width - gap)}V${y(0)}Z`)
    .join("");
  return [svg("path", { d: path, class: "control-bars" })];
}

function steps(points, x, y, to) {
  if (!points.length) return [];
  const [[first, value], ...others] = points;
  let line = `M${x(first)} ${y(value)}`;
  for (const [at, next] of others) line += `H${x(at)}V${y(next)}`;
  line += `H${x(to)}`;
  return [
    svg("path", { d: `${line}V${y(0)}H${x(first)}Z`, class: "control-area" }),
    svg("path", { d: line, class: "control-line" }),
  ];
}
