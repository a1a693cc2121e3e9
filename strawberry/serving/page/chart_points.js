// What a chart draws: metrics and axes to choose from, and the points of curves.

const ROUTER = "router";
/** Metrics by name: the key of a logged step, that of an evaluation, both or either. */
export const METRICS = {
  loss: { label: "loss", axis: "nats per token", logged: "loss", evaluated: "val_loss", log: true },
  val_loss: { label: "validation loss", axis: "nats per token", evaluated: "val_loss", log: true },
  train_loss: { label: "training loss, evaluated", axis: "nats per token", evaluated: "train_loss", log: true },
  val_bpb: { label: "validation bits per byte", axis: "bits per byte", evaluated: "val_bpb", log: true },
  train_bpb: { label: "training bits per byte", axis: "bits per byte", evaluated: "train_bpb", log: true },
  lr: { label: "learning rate", axis: "learning rate", logged: "lr" },
  grad_norm: { label: "gradient norm", axis: "norm before clipping", logged: "grad_norm", log: true },
  tokens_per_s: { label: "throughput", axis: "tokens per second", logged: "tokens_per_s" },
  routers: { label: "router load", axis: "largest share × experts; 1 is even", logged: ROUTER }
};
export const AXES = { step: "step", tokens: "tokens", flops: "FLOP", seconds: "seconds in steps" };

/** The points of a curve: [xs, ys]. An evaluation has no seconds, so it has those of the line before. */
export function points(lines, x, y, flopsPerToken) {
  const xs = [],
    ys = [];
  let latest = null;
  for (const line of lines) {
    const at = x === "flops" ? (line.tokens == null || !flopsPerToken ? null : line.tokens * flopsPerToken) : line[x];
    latest = at ?? latest;
    const value = y === ROUTER ? imbalance(line.routers) : line[y];
    if (latest == null || value == null) continue;
    if (xs.length && latest <= xs.at(-1)) {
      // a rollback goes back: what was done again counts
      while (xs.length && xs.at(-1) >= latest) {
        xs.pop();
        ys.pop();
      }
    }
    xs.push(latest);
    ys.push(value);
  }
  return [xs, ys];
}

/** Of all routers the largest share of the tokens that one expert gets, times the experts. */
const imbalance = routers =>
  routers ? Math.max(...Object.values(routers).map(shares => Math.max(...shares) * shares.length)) : null;

/** Exponential moving averages, of which the first is no more weighted than the others (as Adam's). */
export function smooth(values, strength) {
  if (!strength) return values;
  let sum = 0,
    weight = 0;
  return values.map(value => {
    sum = strength * sum + (1 - strength) * value;
    weight = strength * weight + (1 - strength);
    return sum / weight;
  });
}

/** The curves of a run, [{run, xs, ys, width, quiet?, dots?, main?}]: what was logged, faint and smoothed, and what was
    evaluated. */
export function curvesOf(run, { metric, x, smoothing }) {
  const { logged, evaluated } = METRICS[metric],
    found = [];
  if (logged) {
    const [xs, ys] = points(run.lines, x, logged, run.flopsPerToken);
    const strength = xs.length > 8 && logged !== "lr" ? smoothing : 0;
    if (strength && xs.length) found.push({ run, xs, ys, width: 1, quiet: true });
    if (xs.length)
      found.push({ run, xs, ys: smooth(ys, strength), width: evaluated ? 1.25 : 1.75, dots: xs.length < 3 });
  }
  if (evaluated) {
    const [xs, ys] = points(run.lines, x, evaluated, run.flopsPerToken);
    if (xs.length) found.push({ run, xs, ys, width: 2, dots: xs.length < 100, main: true });
  }
  return found;
}

/** The points that a logarithmic axis has room for. */
export function positive(xs, ys) {
  const from = xs.findIndex(x => x > 0);
  return from < 0 ? [[], []] : [xs.slice(from), ys.slice(from)];
}
