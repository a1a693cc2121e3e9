// What this tab keeps of the table of runs: which are chosen, with their colours, how it is sorted, and the filter.

const kept = JSON.parse(sessionStorage.getItem("runs") ?? "null");

/** chosen: id → colour; down: whether the largest is first; wasChosen: whether a run was ever chosen in this tab. */
export const state = {
  chosen: new Map(kept?.chosen ?? []),
  sort: kept?.sort ?? "started",
  down: kept?.down ?? true,
  filter: "",
  wasChosen: kept !== null
};

function store() {
  const { chosen, sort, down } = state;
  sessionStorage.setItem("runs", JSON.stringify({ chosen: [...chosen], sort, down }));
}

/** Chooses a run, with the first colour that no other chosen run has. */
export function choose(id, is) {
  if (!is) state.chosen.delete(id);
  else if (!state.chosen.has(id)) {
    const taken = new Set(state.chosen.values());
    let colour = 0;
    while (taken.has(colour)) colour++;
    state.chosen.set(id, colour);
  }
  state.wasChosen = true;
  store();
}

export function sortBy(name, down) {
  Object.assign(state, { sort: name, down });
  store();
}
