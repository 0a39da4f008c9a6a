// The view in which a person ranks the answers to a prompt: by clicks, by dragging, or by keys alone.
// This module holds what is being rated; the others draw it, keep it and send it.
import { getJson, postJson, state } from "./api.js";
import { announce, button, el, toast, uuid } from "./dom.js";
import { draftOf, forget, keep } from "./drafts.js";
import { dragging } from "./dragging.js";
import { drawEditor, written } from "./editor.js";
import * as keys from "./keys.js";
import { note, problem } from "./notes.js";
import * as outbox from "./outbox.js";
import { chipText, drawRanking, placeText, status } from "./places.js";
import * as rankings from "./ranking.js";
import { head, taskPage, withoutTask } from "./task.js";
import { t } from "./words.js";

// `draft` is that of `task`; `sending`: a rating is on its way, and nothing may change
const desk = { task: null, draft: null, progress: null, sending: false };
const acts = { toggle, tie, back, drop, shift, sure, edit, send, undo, help };
const pressed = keys.keyListener(acts, () => desk.task?.answers.length ?? 0);

let root = null; // the view's element while it is shown
let visit = 0; // counts showings, so that an answer to an earlier one is not drawn
let clock = 0;

/* ---- which task is shown ---- */

export function show(main, { askName }) {
  if (!state.rater) {
    askName();
    return;
  }
  root = main;
  visit += 1;
  document.addEventListener("keydown", pressed);
  clock = setInterval(tick, 1000);
  const left = outbox.left(state.rater);
  if (desk.sending && desk.task) drawTask();
  else if (desk.sending || left) root.replaceChildren(note(t("rate.sending")));
  else load();
  if (left && !desk.sending) deliver(left); // after a reload it goes first, as it was sent
}

export function hide() {
  document.removeEventListener("keydown", pressed);
  clearInterval(clock);
  root = null;
}

async function load({ quiet = false } = {}) {
  const here = visit;
  if (!quiet) root.replaceChildren(note(t("loading")));
  try {
    const answer = await getJson("/api/task");
    if (root && here === visit) take(answer);
  } catch (error) {
    if (root && here === visit) root.replaceChildren(problem(error, load));
  }
}

/** A task from the server becomes the one on the page; a draft of it comes back. */
function take(answer) {
  adopt(answer);
  if (desk.task) drawTask();
  else drawWithout(answer.waiting);
}

function adopt({ task, progress, said }) {
  Object.assign(desk, { task, progress });
  if (!task) return;
  desk.draft = draftOf(task, said);
  keep(desk.draft);
}

/** The time that the prompt was looked at; a page in the background does not count. */
function tick() {
  if (locked() || document.hidden) return;
  desk.draft.seconds += 1;
  if (desk.draft.seconds % 5 === 0) keep(desk.draft);
}

/* ---- what a person does ---- */

function locked() {
  return desk.sending || !desk.task;
}

/** Every change of the ranking goes through here; `words` say it to screen readers. */
function change(ranking, words = null) {
  if (locked()) return;
  desk.draft.ranking = ranking;
  keep(desk.draft);
  redraw();
  announce([words, status(ranking)].filter(Boolean).join(". "));
}

function changePlace(ranking, answer) {
  const place = placeText(ranking, rankings.placeOf(ranking, answer));
  change(ranking, t("rate.now", { n: answer + 1, place }));
}

function toggle(answer) {
  if (locked()) return;
  const { ranking } = desk.draft;
  if (rankings.placeOf(ranking, answer) < 0) changePlace(rankings.put(ranking, answer), answer);
  else change(rankings.remove(ranking, answer), t("rate.removed", { n: answer + 1 }));
}

function tie() {
  if (locked()) return;
  const ranking = rankings.tieNext(desk.draft.ranking);
  change(ranking, t(ranking.tie ? "rate.tie_hint" : "rate.tie_off"));
}

function back() {
  if (!locked()) change(rankings.takeBack(desk.draft.ranking));
}

/** An answer was dropped on a place, or outside of them, which takes it back. */
function drop(answer, target) {
  if (locked()) return;
  const { ranking } = desk.draft;
  if (target) changePlace(rankings.drop(ranking, answer, target), answer);
  else if (rankings.placeOf(ranking, answer) >= 0) toggle(answer);
}

function shift(answer, step) {
  if (!locked()) changePlace(rankings.shift(desk.draft.ranking, answer, step), answer);
}

/** Sets how sure one is, or takes it back; without a level the next one. */
function sure(level = ((desk.draft.confidence ?? 0) % 3) + 1) {
  if (locked()) return;
  desk.draft.confidence = desk.draft.confidence === level ? null : level;
  keep(desk.draft);
  redraw();
}

function edit() {
  if (locked()) return;
  const best = desk.draft.ranking.groups[0]?.[0] ?? 0;
  desk.draft.better ??= desk.task.answers[best].text.trim();
  keep(desk.draft);
  openEditor();
  const field = root.querySelector("#better");
  root.querySelector(".editor").scrollIntoView({ block: "nearest" }); // not behind the bar
  field.focus({ preventScroll: true });
  field.setSelectionRange(field.value.length, field.value.length);
}

function help() {
  keys.help(desk.task?.answers.length ?? state.k);
}

/* ---- sending ---- */

function send(kind) {
  const { task, draft } = desk;
  if (locked() || (kind === "ranking" && rankings.left(draft.ranking))) return;
  const body = {
    key: uuid(),
    task: task.id,
    kind,
    order: kind === "ranking" ? draft.ranking.groups : null,
    confidence: kind === "skip" ? null : draft.confidence,
    seconds: draft.seconds,
    better: written(desk),
  };
  outbox.put(state.rater, body);
  deliver(body);
}

async function deliver(body) {
  desk.sending = true;
  redraw();
  let answer = null;
  try {
    answer = await outbox.deliver(body, { waits: drawRetry, goesOn: clearRetry });
  } catch (error) {
    toast(t("rate.refused", { why: error.message }), { error: true });
  }
  desk.sending = false;
  if (answer) saved(body, answer);
  else if (root) load();
}

function saved({ kind, task }, answer) {
  forget(task);
  desk.task = null;
  toast(t(`rate.saved.${kind}`), { action: { text: t("undo"), run: undo } });
  if (!root) return;
  take(answer);
  toTop();
}

async function undo() {
  if (desk.sending) return;
  try {
    const answer = await postJson("/api/undo", {});
    adopt(answer); // the draft of what was said is kept, and the view finds it
    if (root) drawTask();
    else location.hash = "#rate";
    toast(t("rate.undone"));
    toTop();
  } catch (error) {
    toast(error.message, { error: error.status !== 409 }); // 409: nothing is left to take back
  }
}

/* ---- drawing ---- */

function toTop() {
  scrollTo(0, 0);
  root?.querySelector("#prompt-title")?.focus({ preventScroll: true });
}

function drawTask() {
  const page = taskPage(desk, acts);
  dragging(page, {
    rail: () => page.querySelector(".rail"),
    ghost: (answer) => chipText(desk.task, answer),
    dropped: drop,
  });
  root.replaceChildren(page);
  if (desk.draft.better !== null) openEditor();
  redraw();
  const pane = page.querySelector(".prompt-text");
  if (pane.scrollHeight > pane.clientHeight + 1) pane.tabIndex = 0; // the keyboard must reach what scrolls
}

function redraw() {
  const page = root?.querySelector(".rating");
  if (page) drawRanking(page, desk, acts);
}

function openEditor() {
  const place = root.querySelector(".editor");
  const close = () => {
    desk.draft.better = null;
    keep(desk.draft);
    place.hidden = true;
    place.replaceChildren();
    root.querySelector(".edit").focus();
  };
  drawEditor(place, desk, { keep: () => keep(desk.draft), send: () => send("ranking"), drop: close });
}

function drawRetry(error, seconds, hurry) {
  const words = t("rate.retry", { why: error.message, n: seconds });
  const now = button({ class: "link", onclick: hurry }, t("rate.retry_now"));
  root?.querySelector(".retry, .loading")?.replaceChildren(words, now);
}

function clearRetry() {
  root?.querySelector(".retry, .loading")?.replaceChildren();
}

/** Nothing to rate; while answers are being written, it looks again by itself. */
function drawWithout(waiting) {
  const here = visit;
  const line = head(desk.progress, acts);
  if (root.querySelector(`[data-waiting=${waiting}]`)) root.querySelector(".head").replaceWith(line);
  else root.replaceChildren(el("div", { "data-waiting": String(waiting) }, line, withoutTask(waiting)));
  if (!waiting) return;
  setTimeout(() => {
    if (root && here === visit && !desk.task) load({ quiet: true });
  }, 1500);
}
