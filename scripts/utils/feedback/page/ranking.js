// A ranking that is being made, as data: every function gives a new one and leaves the old as it was.
//   count   how many answers there are
//   groups  positions of answers from best to worst; those of one group are tied: [[2], [0, 1]]
//   tie     whether the next answer shares the last place

export const empty = (count) => ({ count, groups: [], tie: false });

export const placeOf = (ranking, answer) => ranking.groups.findIndex((group) => group.includes(answer));

export const left = (ranking) => ranking.count - ranking.groups.flat().length;

const taken = (groups, answer) => groups.map((group) => group.filter((other) => other !== answer));

const filled = (groups) => groups.filter((group) => group.length);

/** The answer in the next place, or beside the last one where a tie was asked for. */
export function put(ranking, answer) {
  if (placeOf(ranking, answer) >= 0) return ranking;
  const { groups } = ranking;
  const tied = ranking.tie && groups.length;
  const next = tied ? [...groups.slice(0, -1), [...groups.at(-1), answer]] : [...groups, [answer]];
  return { ...ranking, groups: next, tie: false };
}

export function remove(ranking, answer) {
  return { ...ranking, groups: filled(taken(ranking.groups, answer)), tie: false };
}

/** Takes back a tie that was asked for, else the answer that was placed last. */
export function takeBack(ranking) {
  const last = ranking.groups.at(-1)?.at(-1);
  return ranking.tie || last === undefined ? { ...ranking, tie: false } : remove(ranking, last);
}

/** Asks for a tie of the next answer with the last one, or takes that back. */
export function tieNext(ranking) {
  return { ...ranking, tie: !ranking.tie && ranking.groups.length > 0 && left(ranking) > 0 };
}

/** The answer dropped at `target`: {group, side}, where side is "before", "with" or "after" that group. */
export function drop(ranking, answer, { group, side }) {
  const groups = taken(ranking.groups, answer); // an emptied group still counts in `group`
  if (side === "with") groups[group] = [...groups[group], answer];
  else groups.splice(side === "before" ? group : group + 1, 0, [answer]);
  return { ...ranking, groups: filled(groups), tie: false };
}

/** The answer one step to better (-1) or worse (1): out of a tie first, then into the neighbour's place. */
export function shift(ranking, answer, step) {
  const group = placeOf(ranking, answer);
  if (ranking.groups[group].length > 1)
    return drop(ranking, answer, { group, side: step < 0 ? "before" : "after" });
  const neighbour = group + step;
  if (!ranking.groups[neighbour]) return ranking;
  return drop(ranking, answer, { group: neighbour, side: "with" });
}
