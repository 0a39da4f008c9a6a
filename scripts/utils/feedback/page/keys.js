// A ranking by keys alone, and the help that lists the keys.
import { button, el, store } from "./dom.js";
import { t } from "./words.js";

const ACTS = {
  "=": (acts) => acts.tie(),
  Backspace: (acts) => acts.back(),
  Enter: (acts) => acts.send("ranking"),
  s: (acts) => acts.send("skip"),
  b: (acts) => acts.send("all_bad"),
  e: (acts) => acts.edit(),
  c: (acts) => acts.sure(),
};
const ALWAYS = { u: (acts) => acts.undo(), "?": (acts) => acts.help() }; // also without a task

const keysOn = () => store.get("keys") !== false;

/** Whether the element uses the key itself: text fields all of them, buttons and links Enter. */
function owns(target, key) {
  if (target.closest("textarea, select, input:not([type=radio]):not([type=checkbox])")) return true;
  return key === "Enter" && Boolean(target.closest("button, a, summary"));
}

/** A listener for keydown; `count()`: how many answers there are to rank now. */
export const keyListener = (acts, count) => (event) => {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || event.repeat) return;
  if (!keysOn() || document.querySelector("dialog[open]") || owns(target, key)) return;
  const name = key.length === 1 ? key.toLowerCase() : key;
  const act = ALWAYS[name] ?? (count() ? ACTS[name] : null);
  if (/^[1-9]$/.test(key) && Number(key) <= count()) acts.toggle(Number(key) - 1);
  else if (act) act(acts);
  else return;
  event.preventDefault();
};

/** Shows the keys, with a switch that turns them off. */
export function help(count) {
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
  const row = ([key, word]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, t(`help.${word}`))];
  const dialog = el(
    "dialog",
    { "aria-labelledby": "help-title", onclose: () => dialog.remove() },
    el("h2", { id: "help-title" }, t("help.title")),
    el("dl", { class: "keys" }, rows.flatMap(row)),
    el("label", { class: "check row" }, box, t("help.switch")),
    button({ class: "primary", onclick: () => dialog.close() }, t("close")),
  );
  document.body.append(dialog);
  dialog.showModal();
}
