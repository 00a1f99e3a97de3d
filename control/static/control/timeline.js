/** How a drop sold: units in all, and units per second, from its opening on. */

import { Chart } from "./charts.js";

const { total, seconds } = JSON.parse(document.getElementById("sales").textContent);
const charts = document.getElementById("chart-sales");

if (charts && seconds.length) {
  const last = seconds.at(-1)[0];
  // A little room, so that a sale of one second has a width too.
  const range = { from: 0, to: Math.max(last + 1, 10) };
  let sold = 0;
  const inAll = [[0, 0], ...seconds.map(([second, units]) => [second, (sold += units)])];
  const [peakSecond, peak] = seconds.reduce((most, now) => (now[1] > most[1] ? now : most));

  new Chart(charts, {
    kind: "steps",
    label: `Units sold since the opening, ${sold} in ${clock(last + 1)}`,
    most: Math.max(total, sold),
    tick: clock,
  }).show({ points: inAll, ...range });
  new Chart(document.getElementById("chart-pace"), {
    kind: "bars",
    label: "Units sold per second",
    tick: clock,
  }).show({ points: seconds, ...range });
  document.getElementById("sales-span").textContent =
    `${sold} units, the last of them ${clock(last)} after the opening`;
  document.getElementById("sales-peak").textContent =
    `at most ${peak}, ${clock(peakSecond)} after the opening`;
}

/** Return seconds as `1:02:03`, `2:03` or `3 s`. */
function clock(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const [hours, minutes, rest] = parts;
  const padded = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${padded(minutes)}:${padded(rest)}` : `${minutes}:${padded(rest)}`;
}
