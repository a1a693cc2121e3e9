// What config/schema.json says of the keys of a run: which there are, their ranges, and what a typed text means.

/** The keys of a run with a model of `arch`, dotted, each with its schema. */
export function keysOf(schema, arch) {
  const found = new Map();
  const walk = (properties, prefix) => {
    for (const [name, one] of Object.entries(properties)) {
      if (prefix + name === "model_hyperparams") {
        const own = one.allOf.find(({ if: { properties } }) => properties.arch.const === arch)?.then ?? one;
        walk(own.properties, "model_hyperparams.");
      } else if (one.properties) walk(one.properties, `${prefix}${name}.`);
      else found.set(prefix + name, one);
    }
  };
  walk(schema.properties, "");
  return found;
}

/** {"a.b": 1} as {"a": {"b": 1}}. */
export function nest(flat) {
  const nested = {};
  for (const [key, to] of Object.entries(flat)) {
    const parts = key.split("."),
      last = parts.pop();
    let at = nested;
    for (const part of parts) at = at[part] = typeof at[part] === "object" && at[part] ? at[part] : {};
    at[last] = to;
  }
  return nested;
}

export function flatten(nested, prefix = "") {
  return Object.assign(
    {},
    ...Object.entries(nested).map(([key, to]) =>
      to && typeof to === "object" && !Array.isArray(to) ? flatten(to, `${prefix}${key}.`) : { [prefix + key]: to }
    )
  );
}

/** Whether two values of a key are the same. */
export const isEqual = (a, b) => JSON.stringify(a) === JSON.stringify(b);

export const kinds = one => one.anyOf ?? [one];
export const choicesOf = one => kinds(one).flatMap(kind => kind.enum ?? (kind.type === "boolean" ? [true, false] : []));
export const isNumber = one => kinds(one).some(kind => ["integer", "number"].includes(kind.type));

/** "1 to 4096", "> 0", … */
export function range(one) {
  const kind = kinds(one).find(kind => ["integer", "number"].includes(kind.type));
  if (!kind) return "";
  const low = kind.minimum ?? kind.exclusiveMinimum,
    high = kind.maximum ?? kind.exclusiveMaximum;
  const below = kind.exclusiveMaximum !== undefined,
    above = kind.exclusiveMinimum !== undefined;
  if (low !== undefined && high !== undefined)
    return `${above ? "above " : ""}${low} to ${below ? "below " : ""}${high}`;
  return low !== undefined
    ? `${above ? "above" : "at least"} ${low}`
    : high !== undefined
      ? `${below ? "below" : "at most"} ${high}`
      : "";
}

/** What a person typed, as a value of the key; undefined where nothing is typed. */
export function parse(text, one) {
  const choice = choicesOf(one).find(choice => String(choice) === text);
  if (choice !== undefined) return choice;
  if (text.trim() === "")
    return kinds(one).some(kind => kind.type === "null")
      ? null
      : kinds(one).some(kind => kind.type === "string")
        ? ""
        : undefined;
  if (kinds(one).every(kind => kind.type === "string")) return text;
  if (isNumber(one) && Number.isFinite(Number(text))) return Number(text);
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}
