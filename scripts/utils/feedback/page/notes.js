// What a view shows in place of its content: that it loads, or why it cannot.
import { button, el } from "./dom.js";
import { t } from "./words.js";

export const note = (text) => el("p", { class: "loading", role: "status" }, text);

/** An error with a button that tries again. */
export const problem = (error, again) =>
  el(
    "div",
    { class: "card ask" },
    el("p", { role: "alert" }, error.message),
    button({ class: "primary", onclick: () => again() }, t("again")),
  );
