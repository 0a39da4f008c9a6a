// Half-made ratings, which survive a reload: {task, ranking, confidence, better, seconds}.
import { store } from "./dom.js";
import * as rankings from "./ranking.js";

const KEPT = 20; // undo goes back to them

const others = (id) => (store.get("drafts") ?? []).filter((draft) => draft.task !== id);

export const keep = (draft) => store.set("drafts", [...others(draft.task), draft].slice(-KEPT));

export const forget = (id) => store.set("drafts", others(id));

/** The draft of a task: of what was `said` before an undo, else the one that was kept, else an empty one. */
export function draftOf({ id, answers }, said) {
  const ranking = rankings.empty(answers.length);
  const fresh = { task: id, ranking, confidence: null, better: null, seconds: 0 };
  if (!said) return (store.get("drafts") ?? []).find((draft) => draft.task === id) ?? fresh;
  const { order, confidence, better } = said;
  return { ...fresh, ranking: { ...ranking, groups: order ?? [] }, confidence, better };
}
