// The view in which a person ranks the answers to a prompt: by clicks, by dragging, or by keys alone.
import { getJson, postJson, state } from "./api.js";
import { announce, el, icon, prose, sleep, store, toast, uuid } from "./dom.js";
import { dragging } from "./dragging.js";
import * as rankings from "./ranking.js";
import { t } from "./words.js";

const KEPT_DRAFTS = 20; // half-made rankings; undo goes back to them
const WAITS = [1, 2, 4, 8, 15]; // seconds between the attempts to send a rating
const ICONS = {
  grip: "M9 6h.01M9 12h.01M9 18h.01M15 6h.01M15 12h.01M15 18h.01",
  undo: "M9 14 4 9l5-5M4 9h10a6 6 0 0 1 0 12h-3",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  back: "M21 5H9l-6 7 6 7h12zM17 9l-6 6M11 9l6 6",
};

let root = null; // the view's element while it is shown
let task = null;
let draft = null; // {task, ranking, confidence, better, seconds} of `task`
let progress = null;
let sending = null; // {body, attempt, hurry} while a rating is on its way
let visit = 0; // counts showings, so that an answer to an earlier one is not drawn
let clock = 0;

const locked = () => Boolean(sending) || !task;
/** "Best", else the number of the place: answers in better places plus one, as in sports. */
const placeName = (place) => {
  const before = draft.ranking.groups.slice(0, place).flat().length;
  return before ? t("rate.place", { n: before + 1 }) : t("rate.best");
};
const tied = (place) => draft.ranking.groups[place].length > 1;
const placeText = (place) => (tied(place) ? t("rate.tied", { place: placeName(place) }) : placeName(place));

/* ---- the task and its draft ---- */

export function show(main, { askName }) {
  if (!state.rater) {
    askName();
    return;
  }
  root = main;
  visit += 1;
  document.addEventListener("keydown", pressed);
  clock = setInterval(tick, 1000);
  if (sending) drawTask();
  else if (store.get("outbox")?.rater === state.rater) resume();
  else load();
}

export function hide() {
  document.removeEventListener("keydown", pressed);
  clearInterval(clock);
  root = null;
}

async function load({ quiet = false } = {}) {
  const here = visit;
  if (!quiet) drawNote(t("loading"));
  try {
    const answer = await getJson("/api/task");
    if (root && here === visit) take(answer);
  } catch (error) {
    if (root && here === visit) drawProblem(error);
  }
}

/** A task from the server becomes the one on the page; a draft of it comes back. */
function take(answer) {
  adopt(answer);
  if (task) drawTask();
  else drawWithout(answer.waiting);
}

function adopt(answer) {
  ({ task, progress } = answer);
  if (!task) return;
  const ranking = rankings.empty(task.answers.length);
  const fresh = { task: task.id, ranking, confidence: null, better: null, seconds: 0 };
  const kept = (store.get("drafts") ?? []).find((other) => other.task === task.id);
  draft = answer.said ? drafted(fresh, answer.said) : (kept ?? fresh);
  keep();
}

const drafted = (fresh, { order, confidence, better }) => ({
  ...fresh,
  ranking: { ...fresh.ranking, groups: order ?? [] },
  confidence,
  better,
});

function keep() {
  const others = (store.get("drafts") ?? []).filter((other) => other.task !== draft.task);
  store.set("drafts", [...others, draft].slice(-KEPT_DRAFTS));
}

function forget(id) {
  store.set(
    "drafts",
    (store.get("drafts") ?? []).filter((other) => other.task !== id),
  );
}

/** The time that the prompt was looked at; a page in the background does not count. */
function tick() {
  if (!task || document.hidden || sending) return;
  draft.seconds += 1;
  if (draft.seconds % 5 === 0) keep();
}

/** Every change of the ranking goes through here. */
function change(ranking, words = null) {
  if (locked()) return;
  draft.ranking = ranking;
  keep();
  drawRanking();
  announce([words, status()].filter(Boolean).join(". "));
}

function toggle(answer) {
  if (locked()) return;
  if (rankings.placeOf(draft.ranking, answer) >= 0) {
    change(rankings.remove(draft.ranking, answer), t("rate.removed", { n: answer + 1 }));
    return;
  }
  const ranking = rankings.put(draft.ranking, answer);
  draft.ranking = ranking;
  change(ranking, t("rate.now", { n: answer + 1, place: placeText(rankings.placeOf(ranking, answer)) }));
}

function tie() {
  if (locked()) return;
  const ranking = rankings.tieNext(draft.ranking);
  change(ranking, t(ranking.tie ? "rate.tie_hint" : "rate.tie_off"));
}

const back = () => {
  if (!locked()) change(rankings.takeBack(draft.ranking));
};

function status() {
  const count = rankings.left(draft.ranking);
  return count ? t("rate.left", { n: count }) : t("rate.ready");
}

function setConfidence(level) {
  if (locked()) return;
  draft.confidence = draft.confidence === level ? null : level;
  keep();
  drawRanking();
}

/* ---- sending ---- */

/** The written answer, unless it is one of those shown or empty. */
function better() {
  const text = draft.better?.trim() ?? "";
  return text && task.answers.every((answer) => answer.text.trim() !== text) ? text : null;
}

function send(kind) {
  if (locked() || (kind === "ranking" && rankings.left(draft.ranking))) return;
  const order = kind === "ranking" ? draft.ranking.groups : null;
  const body = {
    key: uuid(),
    task: task.id,
    kind,
    order,
    confidence: kind === "skip" ? null : draft.confidence,
    seconds: draft.seconds,
    better: better(),
  };
  store.set("outbox", { rater: state.rater, body });
  deliver(body);
}

/** After a reload, a rating that has no answer yet goes first, as it was sent. */
function resume() {
  drawNote(t("rate.sending"));
  deliver(store.get("outbox").body);
}

/** Sends until the server has it. With the same key, an attempt whose answer was lost counts once. */
async function deliver(body) {
  sending = { body, hurry: null };
  drawRanking();
  for (let attempt = 0; ; attempt += 1) {
    try {
      delivered(body, await postJson("/api/ratings", body));
      return;
    } catch (error) {
      if (!error.passing) {
        refused(error);
        return;
      }
      await pause(WAITS[Math.min(attempt, WAITS.length - 1)], error);
    }
  }
}

async function pause(seconds, error) {
  const wait = sleep(seconds * 1000);
  const hurry = new Promise((done) => {
    sending.hurry = done;
  });
  drawRetry(t("rate.retry", { why: error.message, n: seconds }));
  addEventListener("online", sending.hurry, { once: true });
  await Promise.race([wait, hurry]);
  drawRetry("");
}

function delivered(body, answer) {
  sending = null;
  store.set("outbox", null);
  forget(body.task);
  task = null;
  const words = t(body.kind === "ranking" ? "rate.saved" : `rate.saved.${body.kind}`);
  toast(words, { action: { text: t("undo"), run: undo } });
  if (!root) return;
  take(answer);
  toTop();
}

function refused(error) {
  sending = null;
  store.set("outbox", null);
  toast(t("rate.refused", { why: error.message }), { error: true });
  if (root) load();
}

async function undo() {
  if (sending) return;
  try {
    const answer = await postJson("/api/undo", {});
    if (!answer?.task) {
      toast(t("rate.nothing_to_undo"));
      return;
    }
    adopt(answer); // the draft of what was said is kept, and the view finds it
    if (root) drawTask();
    else location.hash = "#rate";
    toast(t("rate.undone"));
    toTop();
  } catch (error) {
    toast(error.message, { error: !(error.status === 404 || error.status === 409) });
  }
}

/* ---- keys ---- */

const KEYS = {
  "=": tie,
  Backspace: back,
  Enter: () => send("ranking"),
  s: () => send("skip"),
  b: () => send("all_bad"),
  e: () => openEditor(),
  c: () => setConfidence(((draft.confidence ?? 0) % 3) + 1),
  u: () => undo(),
  "?": () => help(),
};

const keysOn = () => store.get("keys") !== false;

/** Whether the element uses the key itself: text fields all of them, buttons and links Enter. */
function owns(target, key) {
  if (target.closest("textarea, select, input:not([type=radio]):not([type=checkbox])")) return true;
  return key === "Enter" && Boolean(target.closest("button, a, summary"));
}

function pressed(event) {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || event.repeat) return;
  if (!keysOn() || !root || document.querySelector("dialog[open]") || owns(target, key)) return;
  const answer = /^[1-9]$/.test(key) ? Number(key) - 1 : -1;
  const action = KEYS[key.length === 1 ? key.toLowerCase() : key];
  if (answer >= 0 && answer < (task?.answers.length ?? 0)) toggle(answer);
  else if (action && (task || "u?".includes(key))) action();
  else return;
  event.preventDefault();
}

/** Arrow keys and Delete on a chip in the list of places. */
function chipKey(event, answer) {
  const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
  if (event.key in steps) {
    const ranking = rankings.shift(draft.ranking, answer, steps[event.key]);
    draft.ranking = ranking;
    change(ranking, t("rate.now", { n: answer + 1, place: placeText(rankings.placeOf(ranking, answer)) }));
    root.querySelector(`.chip[data-drag="${answer}"]`).focus();
  } else if (event.key === "Delete") {
    toggle(answer);
    root.querySelector(`.answer[data-drag="${answer}"] .pick`).focus();
  } else return;
  event.preventDefault();
  event.stopPropagation();
}

function help() {
  const count = task?.answers.length ?? state.k;
  const rows = [
    [`1 – ${count}`, "place"],
    ["=", "tie"],
    ["⌫", "back"],
    ["Enter", "send"],
    ["s", "skip"],
    ["b", "bad"],
    ["e", "edit"],
    ["c", "sure"],
    ["u", "undo"],
    ["← →", "chip"],
    ["?", "help"],
  ];
  const box = el("input", {
    type: "checkbox",
    checked: keysOn(),
    onchange: () => store.set("keys", box.checked),
  });
  const dialog = el(
    "dialog",
    { "aria-labelledby": "help-title", onclose: () => dialog.remove() },
    el("h2", { id: "help-title" }, t("help.title")),
    el(
      "dl",
      { class: "keys" },
      rows.map(([key, word]) =>
        el("div", {}, el("dt", {}, el("kbd", {}, key)), el("dd", {}, t(`help.${word}`))),
      ),
    ),
    el("label", { class: "check" }, box, t("help.switch")),
    el("button", { type: "button", class: "primary", onclick: () => dialog.close() }, t("close")),
  );
  document.body.append(dialog);
  dialog.showModal();
}

/* ---- drawing ---- */

function toTop() {
  scrollTo(0, 0);
  root?.querySelector("#prompt-title")?.focus({ preventScroll: true });
}

/** The line above: what to do, how far it is, undo and help. */
function head(lead = null) {
  const { rated = 0, total = 0, seconds_left: seconds = null } = progress ?? {};
  const minutes = Math.max(1, Math.round(seconds / 60));
  const time =
    minutes < 90 ? t("rate.minutes", { n: minutes }) : t("rate.hours", { n: Math.round(minutes / 60) });
  const words = t("rate.progress", { rated, total });
  const rest = seconds && rated < total ? t("rate.time", { time }) : "";
  return el(
    "div",
    { class: "head" },
    el("div", { class: "grow" }, el("h1", {}, t("rate.title")), lead && el("p", { class: "lead" }, lead)),
    el(
      "div",
      { class: "progress" },
      el("p", {}, el("span", {}, words), el("span", {}, rest)),
      el("progress", { max: Math.max(total, 1), value: rated, "aria-label": words }),
    ),
    el(
      "div",
      { class: "row" },
      el(
        "button",
        { type: "button", class: "quiet", disabled: rated === 0, onclick: undo },
        icon(ICONS.undo),
        t("undo"),
        el("kbd", { "aria-hidden": "true" }, "u"),
      ),
      el(
        "button",
        { type: "button", class: "quiet", onclick: help },
        t("rate.help"),
        el("kbd", { "aria-hidden": "true" }, "?"),
      ),
    ),
  );
}

function drawNote(text) {
  root.replaceChildren(el("p", { class: "loading", role: "status" }, text));
}

function drawProblem(error) {
  root.replaceChildren(
    el(
      "div",
      { class: "card ask" },
      el("p", { role: "alert" }, error.message),
      el("button", { type: "button", class: "primary", onclick: () => load() }, t("again")),
    ),
  );
}

/** Nothing to rate: answers are still being written, or everything is rated. */
function drawWithout(waiting) {
  const here = visit;
  const name = waiting ? "waiting" : "done";
  const words = el(
    "div",
    { class: "card ask", role: "status" },
    waiting ? el("div", { class: "dots", "aria-hidden": "true" }, el("i"), el("i"), el("i")) : null,
    el("h2", {}, t(`rate.${name}`)),
    el("p", {}, waiting && state.trouble ? state.trouble : t(`rate.${name}_text`)),
  );
  if (!waiting) {
    words.append(
      el(
        "div",
        { class: "row" },
        el("a", { class: "button primary", href: "#train" }, t("rate.to_train")),
        el("a", { class: "button", href: "#look" }, t("rate.to_look")),
      ),
    );
  }
  if (root.querySelector(`[data-state=${name}]`)) root.querySelector(".head").replaceWith(head());
  else root.replaceChildren(el("div", { "data-state": name }, head(), words));
  if (waiting)
    setTimeout(() => {
      if (root && here === visit && !task) load({ quiet: true });
    }, 1500);
}

function drawTask() {
  const fingers = matchMedia("(hover: none)").matches;
  const lead =
    (progress?.rated ?? 0) < 3
      ? t(fingers ? "rate.lead_touch" : "rate.lead", { k: task.answers.length })
      : null;
  const rail = el("ol", { class: "rail", "aria-label": t("rate.ranking") });
  const page = el(
    "div",
    { class: "rating" },
    head(lead),
    el("section", { class: "prompt card", "aria-labelledby": "prompt-title" }, promptParts()),
    el(
      "section",
      { class: "answers", "aria-labelledby": "answers-title" },
      el("h2", { class: "sr", id: "answers-title" }, t("rate.answers")),
      el("ul", { class: "cards" }, task.answers.map(card)),
      el("div", { class: "extras" }, confidence(), editButton()),
      el("div", { class: "editor", hidden: true }),
    ),
    el(
      "div",
      { class: "bar", role: "group", "aria-label": t("rate.ranking") },
      el("p", { class: "retry", role: "alert" }),
      rail,
      actions(),
    ),
  );
  page.addEventListener("click", blurAfterMouse);
  dragging(page, { rail: () => rail, ghost: chipText, dropped });
  root.replaceChildren(page);
  if (draft.better !== null) drawEditor();
  drawRanking();
  letKeysScroll();
}

/** A prompt that is taller than its pane scrolls, and then the keyboard must reach it. */
function letKeysScroll() {
  const pane = root.querySelector(".prompt-text");
  if (pane.scrollHeight > pane.clientHeight + 1) pane.tabIndex = 0;
}

function promptParts() {
  const { messages } = task.prompt;
  const named = messages.length > 1;
  const turns = messages.map(({ role, html }) =>
    el(
      "div",
      { class: `turn ${role}` },
      named ? el("p", { class: "role" }, t(`role.${role}`)) : null,
      prose(html),
    ),
  );
  return [
    el("h2", { id: "prompt-title", tabindex: "-1" }, t("rate.prompt")),
    el("div", { class: "prompt-text", role: "group", "aria-labelledby": "prompt-title" }, turns),
  ];
}

function card({ text, html }, answer) {
  const body = text.trim() ? prose(html) : el("p", { class: "prose muted" }, t("rate.empty"));
  const click = (event) => {
    if (event.target.closest("a, .pick") || String(getSelection())) return;
    toggle(answer);
  };
  return el(
    "li",
    { class: "answer card", "data-drag": answer, onclick: click },
    el(
      "div",
      { class: "answer-head" },
      el(
        "button",
        { type: "button", class: "pick", onclick: () => toggle(answer) },
        el("kbd", { "aria-hidden": "true" }, String(answer + 1)),
        el("span", { class: "where" }),
      ),
      el("span", { class: "grip", title: t("rate.drag"), "aria-hidden": "true" }, icon(ICONS.grip)),
    ),
    body,
  );
}

function confidence() {
  return el(
    "fieldset",
    { class: "sure" },
    el("legend", {}, t("rate.sure"), el("kbd", { "aria-hidden": "true" }, "c")),
    [1, 2, 3].map((level) =>
      el(
        "button",
        { type: "button", "data-level": level, onclick: () => setConfidence(level) },
        t(`rate.sure.${level}`),
      ),
    ),
  );
}

function editButton() {
  return el(
    "button",
    { type: "button", class: "edit", onclick: openEditor },
    icon(ICONS.edit),
    t("rate.edit"),
    el("kbd", { "aria-hidden": "true" }, "e"),
  );
}

function actions() {
  const button = (name, words, key, run, glyph = null) =>
    el(
      "button",
      { type: "button", class: name, onclick: run },
      glyph,
      el("span", {}, words),
      el("kbd", { "aria-hidden": "true" }, key),
    );
  return el(
    "div",
    { class: "actions" },
    button("tie", t("rate.tie"), "=", tie),
    button("back", t("rate.back"), "⌫", back, icon(ICONS.back)),
    el("span", { class: "grow status" }),
    button("all-bad", t("rate.all_bad"), "b", () => send("all_bad")),
    button("skip", t("rate.skip"), "s", () => send("skip")),
    button("send primary", t("rate.send"), "⏎", () => send("ranking")),
  );
}

/** After a click by mouse or finger a button gives up the focus, so that Enter sends and clicks nothing. */
function blurAfterMouse(event) {
  if (["mouse", "touch", "pen"].includes(event.pointerType) && !event.target.closest(".editor, .edit")) {
    document.activeElement?.blur();
  }
}

/** What changes with the ranking: the cards' places, the list of places, the buttons. */
function drawRanking() {
  const page = root?.querySelector(".rating");
  if (!page) return;
  const { ranking } = draft;
  page.classList.toggle("sending", Boolean(sending));
  page.querySelectorAll(".answer").forEach((node, answer) => drawPlace(node, answer));
  page.querySelector(".rail").replaceChildren(...slots());
  const count = rankings.left(ranking);
  page.querySelector(".status").textContent = sending ? t("rate.sending") : status();
  const set = (name, { off, on = null }) => {
    const button = page.querySelector(`.${name}`);
    button.setAttribute("aria-disabled", String(Boolean(off))); // stays in the order of the Tab key
    if (on !== null) button.setAttribute("aria-pressed", String(on));
  };
  set("tie", { off: sending || !ranking.groups.length || !count, on: ranking.tie });
  set("back", { off: sending || !ranking.groups.length });
  set("send", { off: sending || count });
  set("all-bad", { off: sending });
  set("skip", { off: sending });
  for (const button of page.querySelectorAll(".sure button")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.level) === draft.confidence));
  }
}

function drawPlace(node, answer) {
  const place = rankings.placeOf(draft.ranking, answer);
  const words = { n: answer + 1, place: place < 0 ? "" : placeText(place) };
  node.classList.toggle("placed", place >= 0);
  node.classList.toggle("best", place === 0);
  node.querySelector(".pick").setAttribute("aria-label", t(place < 0 ? "rate.pick" : "rate.picked", words));
  node.querySelector(".where").textContent = place < 0 ? "" : (tied(place) ? "= " : "") + placeName(place);
}

/** The places of the ranking, best first, then one free place for each answer that is left. */
function slots() {
  const { groups, tie: asked } = draft.ranking;
  const made = groups.map((group, place) =>
    el(
      "li",
      { class: `slot of-${group.length}${place ? "" : " best"}` },
      el("span", { class: "slot-name" }, placeText(place)),
      el(
        "div",
        { class: "chips" },
        group.map((answer) => chip(answer, place)),
        asked && place === groups.length - 1
          ? el("span", { class: "asked", "aria-hidden": "true" }, "?")
          : null,
      ),
    ),
  );
  const placed = groups.flat().length;
  const free = Array.from({ length: rankings.left(draft.ranking) }, (_, index) =>
    el(
      "li",
      { class: "slot free" },
      el(
        "span",
        { class: "slot-name" },
        placed + index ? t("rate.place", { n: placed + index + 1 }) : t("rate.best"),
      ),
    ),
  );
  return [...made, ...free];
}

const chipText = (answer) => [
  el("b", {}, String(answer + 1)),
  el("span", {}, task.answers[answer].text.trim().slice(0, 80) || t("rate.empty")),
];

function chip(answer, place) {
  return el(
    "button",
    {
      type: "button",
      class: "chip",
      "data-drag": answer,
      dir: "auto",
      "aria-label": t("rate.chip", { n: answer + 1, place: placeText(place) }),
      onkeydown: (event) => chipKey(event, answer),
    },
    chipText(answer),
  );
}

function dropped(answer, target) {
  if (locked()) return;
  if (!target) {
    if (rankings.placeOf(draft.ranking, answer) >= 0) toggle(answer);
    return;
  }
  const ranking = rankings.drop(draft.ranking, answer, target);
  draft.ranking = ranking;
  change(ranking, t("rate.now", { n: answer + 1, place: placeText(rankings.placeOf(ranking, answer)) }));
}

function drawRetry(words) {
  const line = root?.querySelector(".retry, .loading");
  if (!line) return;
  line.replaceChildren(
    words,
    words
      ? el(
          "button",
          { type: "button", class: "link", onclick: () => sending?.hurry?.() },
          t("rate.retry_now"),
        )
      : "",
  );
}

/* ---- the better answer ---- */

function openEditor() {
  if (locked()) return;
  const best = draft.ranking.groups[0]?.[0] ?? 0;
  draft.better ??= task.answers[best].text.trim();
  keep();
  drawEditor();
  const field = root.querySelector("#better");
  root.querySelector(".editor").scrollIntoView({ block: "nearest" }); // not behind the bar
  field.focus({ preventScroll: true });
  field.setSelectionRange(field.value.length, field.value.length);
}

function drawEditor() {
  const place = root.querySelector(".editor");
  const note = el("p", { class: "muted", id: "better-note" });
  const words = () => {
    note.textContent = better() ? t("rate.better_help") : t("rate.better_same");
  };
  const field = el("textarea", {
    id: "better",
    rows: 4,
    dir: "auto",
    "aria-describedby": "better-note",
    oninput: () => {
      draft.better = field.value;
      keep();
      words();
    },
    onkeydown: (event) => {
      if (event.key === "Escape") field.blur();
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send("ranking");
    },
  });
  field.value = draft.better;
  const drop = () => {
    draft.better = null;
    keep();
    place.hidden = true;
    place.replaceChildren();
    root.querySelector(".edit").focus();
  };
  place.replaceChildren(
    el("label", { for: "better" }, t("rate.better")),
    field,
    el(
      "div",
      { class: "row" },
      note,
      el("button", { type: "button", class: "quiet", onclick: drop }, t("rate.better_drop")),
    ),
  );
  place.hidden = false;
  words();
}
