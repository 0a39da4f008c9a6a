// The better answer that a rater writes; it begins as the best one of the ranking.
import { button, el } from "./dom.js";
import { refuseLong } from "./limits.js";
import { t } from "./words.js";

/** The written answer; null where it is empty or one of those shown. */
export function written({ task, draft }) {
  const text = draft.better?.trim() ?? "";
  return text && task.answers.every((answer) => answer.text.trim() !== text) ? text : null;
}

/** Fills `place` with the editor. `keep()`: the text has changed; `send()`: Ctrl Enter; `drop()`: Remove. */
export function drawEditor(place, desk, { keep, send, drop }) {
  const note = el("p", { class: "muted", id: "better-note" });
  const say = () => {
    note.textContent = written(desk) ? t("rate.better_help") : t("rate.better_same");
  };
  const field = el("textarea", {
    id: "better",
    rows: 4,
    dir: "auto",
    "aria-describedby": "better-note",
    onbeforeinput: refuseLong,
    oninput: () => {
      desk.draft.better = field.value;
      keep();
      say();
    },
    onkeydown: (event) => {
      if (event.key === "Escape") field.blur();
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
    },
  });
  field.value = desk.draft.better;
  place.replaceChildren(
    el("label", { for: "better" }, t("rate.better")),
    field,
    el(
      "div",
      { class: "row apart small" },
      note,
      button({ class: "quiet", onclick: drop }, t("rate.better_drop")),
    ),
  );
  place.hidden = false;
  say();
}
