// The plot of a chart: what uPlot is told of its scales, axes and series.

import { AXES, METRICS } from "./chart_points.js";
import { size } from "./dom.js";

/* global uPlot */

export const COLOURS = 8;
const WHOLE = Array.from({ length: 18 }, (_, e) => [1, 2, 5].map(f => f * 10 ** e)).flat(); // distances of ticks
const FONT = "12px system-ui, sans-serif";

/** Round numbers between low and high. */
function ticks(low, high, most = 6) {
  const step =
    [1, 2, 2.5, 5, 10]
      .map(f => f * 10 ** Math.floor(Math.log10((high - low) / most)))
      .find(step => (high - low) / step <= most) ?? high - low;
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(Number((n * step).toPrecision(12)));
  return found;
}

/** Ticks of a logarithmic axis: round numbers where it spans less than a factor of 20, else 1, 2, 5, 10, … */
function logTicks(low, high) {
  if (high / low < 20) return ticks(low, high);
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) {
    for (const f of high / low < 1e4 ? [1, 2, 5] : [1])
      if (f * 10 ** e >= low && f * 10 ** e <= high) found.push(f * 10 ** e);
  }
  return found;
}

const tickText = n =>
  n == null
    ? ""
    : Math.abs(n) >= 1000
      ? size(n)
      : n === 0
        ? "0"
        : Math.abs(n) < 1e-3
          ? n.toExponential(0)
          : String(Number(n.toPrecision(6)));
/** For each series its own point that is nearest to the cursor. */
function nearest(u, seriesIndex, hovered) {
  const values = u.data[seriesIndex];
  if (values[hovered] != null) return hovered;
  for (let d = 1; d < values.length; d++) {
    if (values[hovered - d] != null) return hovered - d;
    if (values[hovered + d] != null) return hovered + d;
  }
  return hovered;
}

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const logSplits = isLog => (isLog ? { splits: (u, i, low, high) => logTicks(low, high) } : {});

const scales = ({ logX, logY }) => ({
  x: { time: false, distr: logX ? 3 : 1 },
  y: {
    distr: logY ? 3 : 1,
    range: logY
      ? (u, low, high) => (low == null ? [1, 10] : [low * 0.97, high * 1.03 + 1e-12])
      : (u, low, high) => (low == null ? [0, 1] : uPlot.rangeNum(low, high, 0.1, true))
  }
});

function axes({ metric, x, logX, logY }) {
  const line = { stroke: css("--line"), width: 1 };
  const both = {
    stroke: css("--soft"),
    font: FONT,
    labelFont: FONT,
    ticks: line,
    values: (u, splits) => splits.map(tickText),
    filter: (u, splits) => splits
  };
  const whole = ["step", "tokens"].includes(x) ? { incrs: WHOLE } : {};
  const ofX = { grid: { show: false }, label: AXES[x], labelSize: 22, size: 30, space: 70 };
  const ofY = { grid: line, label: METRICS[metric].axis, labelSize: 20, size: 54 };
  return [
    { ...both, ...ofX, ...whole, ...logSplits(logX) },
    { ...both, ...ofY, ...logSplits(logY) }
  ];
}

function seriesSettings({ run, width, dots, quiet, main }) {
  const colour = css(`--c${run.colour % COLOURS}`);
  return {
    label: run.name,
    stroke: colour + (quiet ? "38" : ""),
    width,
    spanGaps: true,
    dash: run.colour >= COLOURS ? [7, 4] : undefined,
    points: { show: Boolean(dots && !quiet), size: main ? 6 : 4, fill: colour }
  };
}

/** What uPlot is told. curves: of curvesOf(); options: {metric, x, logX, logY}; box: {width, height};
    onCursor() and onScale() are called when the cursor has moved and when the range of x is another. */
export function plotSettings(curves, options, box, { onCursor, onScale }) {
  return {
    ...box,
    legend: { show: false },
    padding: [8, 12, 0, 0],
    scales: scales(options),
    axes: axes(options),
    cursor: {
      drag: { x: true, y: false, dist: 8 },
      points: { size: 7, show: (u, i) => !curves[i - 1].quiet },
      dataIdx: nearest
    },
    series: [{}, ...curves.map(seriesSettings)],
    hooks: { setCursor: [onCursor], setScale: [onScale] }
  };
}
