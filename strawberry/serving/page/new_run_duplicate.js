// A run that is there already, as the beginning of a new one.

import { get } from "./api.js";
import { isEqual } from "./schema.js";

/** The preset of the same family with the fewest differences. */
function nearestPreset(values, presets) {
  const arch = "model_hyperparams.arch";
  const same = presets.filter(preset => preset.values[arch] === values[arch]);
  const differences = preset => Object.keys(values).filter(key => !isEqual(values[key], preset.values[key])).length;
  return same.sort((a, b) => differences(a) - differences(b))[0] ?? presets[0];
}

/** The preset or model of a run and the keys that differ from it: {start, changes}. */
function startOf({ summary, values }, { presets, models }) {
  const isKnown = [...presets.data, ...models].some(one => one.id === summary.preset);
  if (isKnown) return { start: summary.preset, changes: summary.changed };
  const preset = nearestPreset(values, presets.data);
  const isChange = ([key, to]) =>
    key !== "seed" &&
    key in preset.values &&
    !isEqual(to, preset.values[key]) &&
    !(key === "lr_decay_iters" && to === values.max_iters);
  return { start: preset.id, changes: Object.fromEntries(Object.entries(values).filter(isChange)) };
}

/** {start, changes, data, seed} of a run; data is undefined for a run of train.py, seed where it has none. */
export async function readRun(id, available) {
  const run = await get(`/v1/runs/${id}`);
  const start = startOf(run, available);
  const { seed } = run.values;
  if (!id.startsWith("ftjob-")) return { ...start, seed: Number.isInteger(seed) ? seed : undefined };
  const job = await get(`/v1/fine_tuning/jobs/${id}`);
  const isThere = available.datasets.some(dataset => dataset.id === job.dataset);
  return { ...start, data: isThere ? job.dataset : job.training_file, seed: job.seed };
}
