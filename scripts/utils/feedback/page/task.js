// The page on which a task is rated: how far one is, the prompt, the answers, the bar with the places.
import { state } from "./api.js";
import { button, el, hint, icon, prose } from "./dom.js";
import { t } from "./words.js";

const ICONS = {
  grip: "M9 6h.01M9 12h.01M9 18h.01M15 6h.01M15 12h.01M15 18h.01",
  undo: "M9 14 4 9l5-5M4 9h10a6 6 0 0 1 0 12h-3",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
};

/** The line above: what to do, how far it is, undo and help. */
export function head(progress, acts, lead = null) {
  const { rated = 0, total = 0 } = progress ?? {};
  const words = t("rate.progress", { rated, total });
  return el(
    "div",
    { class: "head" },
    el("div", { class: "grow" }, el("h1", {}, t("rate.title")), lead && el("p", { class: "lead" }, lead)),
    el(
      "div",
      { class: "progress" },
      el("p", { class: "row apart" }, el("span", {}, words), el("span", {}, timeLeft(progress))),
      el("progress", { max: Math.max(total, 1), value: rated, "aria-label": words }),
      el("p", { class: "until muted small" }, untilRound(progress)),
    ),
    el(
      "div",
      { class: "row" },
      button(
        { class: "quiet", disabled: rated === 0, onclick: acts.undo },
        icon(ICONS.undo),
        t("undo"),
        hint("u"),
      ),
      button({ class: "quiet keys-help", onclick: acts.help }, t("rate.help"), hint("?")),
    ),
  );
}

/** How many more rated prompts a round of training needs, or wants. */
function untilRound(progress) {
  if (!progress) return "";
  const { to_round: few, to_full: more } = progress;
  return few ? t("rate.to_round", { n: few }) : more ? t("rate.to_full", { n: more }) : "";
}

function timeLeft(progress) {
  if (!progress?.seconds_left || progress.rated >= progress.total) return "";
  const minutes = Math.max(1, Math.round(progress.seconds_left / 60));
  const time =
    minutes < 90 ? t("rate.minutes", { n: minutes }) : t("rate.hours", { n: Math.round(minutes / 60) });
  return t("rate.time", { time });
}

/** All of the page but the ranking, which `drawRanking` draws into it. */
export function taskPage({ task, progress }, acts) {
  const fingers = matchMedia("(hover: none)").matches;
  const lead =
    (progress?.rated ?? 0) < 3
      ? t(fingers ? "rate.lead_touch" : "rate.lead", { k: task.answers.length })
      : null;
  return el(
    "div",
    { class: "rating", onclick: blurAfterMouse },
    head(progress, acts, lead),
    prompt(task.prompt),
    el(
      "section",
      { class: "answers", "aria-labelledby": "answers-title" },
      el("h2", { class: "sr", id: "answers-title" }, t("rate.answers")),
      el(
        "ul",
        { class: "cards" },
        task.answers.map((shown, answer) => card(shown, answer, acts)),
      ),
      el("div", { class: "extras row" }, confidence(acts), editButton(acts)),
      el("div", { class: "editor", hidden: true }),
    ),
    el(
      "div",
      { class: "bar", role: "group", "aria-label": t("rate.ranking") },
      el("p", { class: "retry row", role: "alert" }),
      el("ol", { class: "rail", "aria-label": t("rate.ranking") }),
      buttons(acts),
    ),
  );
}

/** After a click by mouse or finger a button gives up the focus, so that Enter sends and clicks nothing. */
function blurAfterMouse(event) {
  if (["mouse", "touch", "pen"].includes(event.pointerType) && !event.target.closest(".editor, .edit")) {
    document.activeElement?.blur();
  }
}

function prompt({ messages }) {
  const named = messages.length > 1;
  const turns = messages.map(({ role, html }) =>
    el(
      "div",
      { class: "turn" },
      named ? el("p", { class: "role tiny" }, t(`role.${role}`)) : null,
      prose(html),
    ),
  );
  return el(
    "section",
    { class: "prompt card", "aria-labelledby": "prompt-title" },
    el("h2", { id: "prompt-title", tabindex: "-1" }, t("rate.prompt")),
    el("div", { class: "prompt-text", role: "group", "aria-labelledby": "prompt-title" }, turns),
  );
}

function card({ text, html }, answer, acts) {
  const body = text.trim() ? prose(html) : el("p", { class: "prose muted" }, t("rate.empty"));
  const click = (event) => {
    if (event.target.closest("a, .pick") || String(getSelection())) return;
    acts.toggle(answer);
  };
  return el(
    "li",
    { class: "answer card", "data-drag": answer, onclick: click },
    el(
      "div",
      { class: "answer-head row apart" },
      button(
        { class: "pick", onclick: () => acts.toggle(answer) },
        el("span", { class: "mark", "aria-hidden": "true" }, String(answer + 1)),
        el("span", { class: "where" }),
      ),
      el("span", { class: "grip", title: t("rate.drag"), "aria-hidden": "true" }, icon(ICONS.grip)),
    ),
    body,
  );
}

function confidence(acts) {
  return el(
    "div",
    { class: "sure row", role: "group", "aria-labelledby": "sure" },
    el("span", { class: "muted small", id: "sure" }, t("rate.sure")),
    hint("c"),
    [1, 2, 3].map((level) =>
      button({ "data-level": level, onclick: () => acts.sure(level) }, t(`rate.sure.${level}`)),
    ),
  );
}

const editButton = (acts) =>
  button({ class: "edit", onclick: acts.edit }, icon(ICONS.edit), t("rate.edit"), hint("e"));

function buttons(acts) {
  const one = (name, words, key, run) => button({ class: name, onclick: run }, words, hint(key));
  return el(
    "div",
    { class: "actions row" },
    one("tie", t("rate.tie"), "=", acts.tie),
    one("back", t("rate.back"), "⌫", acts.back),
    el("span", { class: "grow status muted small" }),
    one("all-bad", t("rate.all_bad"), "b", () => acts.send("all_bad")),
    one("skip", t("rate.skip"), "s", () => acts.send("skip")),
    one("send primary", t("rate.send"), "↵", () => acts.send("ranking")),
  );
}

/** In place of a task: answers are still being written, or everything is rated. */
export const withoutTask = (waiting) =>
  el("div", { class: "card ask", role: "status" }, waiting ? waitingParts() : doneParts());

const waitingParts = () => [
  el("h2", {}, t("rate.waiting")),
  el("progress", { "aria-label": t("rate.waiting") }),
  el("p", {}, state.trouble ?? t("rate.waiting_text")),
];

const doneParts = () => [
  el("h2", {}, t("rate.done")),
  el("p", {}, t("rate.done_text")),
  el(
    "div",
    { class: "row" },
    el("a", { class: "button primary", href: "#train" }, t("rate.to_train")),
    el("a", { class: "button", href: "#look" }, t("rate.to_look")),
  ),
];
