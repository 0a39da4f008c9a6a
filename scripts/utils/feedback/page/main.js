// The frame around the four views: which one is shown, the language, the theme, the login, who rates.
import { loadState, postJson, nameRater, state } from "./api.js";
import { announce, clearToast, el, icon, store, toast } from "./dom.js";
import { problem } from "./notes.js";
import { language, otherLanguage, setLanguage, t } from "./words.js";
import * as chat from "./chat.js";
import * as look from "./look.js";
import * as rate from "./rate.js";
import * as train from "./train.js";

const views = { chat, rate, look, train };
const themes = ["auto", "light", "dark"];
const themeIcons = {
  auto: "M12 3a9 9 0 1 0 0 18zM12 3a9 9 0 0 1 0 18",
  light:
    "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v3M12 19v3M2 12h3M19 12h3M5 5l2 2M17 17l2 2M19 5l-2 2M7 17l-2 2",
  dark: "M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z",
};

const main = document.getElementById("main");
let current = null;

const viewName = () => {
  const name = location.hash.slice(1).split("/")[0];
  return name in views ? name : "rate";
};

/** Draws the frame's words and buttons. */
function drawFrame() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-word]")) node.textContent = t(node.dataset.word);
  for (const node of document.querySelectorAll("[data-label]"))
    node.setAttribute("aria-label", t(node.dataset.label));
  const other = otherLanguage();
  const button = document.getElementById("language");
  button.textContent = other.name;
  button.lang = other.code;
  drawTheme();
  drawWho();
}

function drawTheme() {
  const theme = document.documentElement.dataset.theme ?? "auto";
  const button = document.getElementById("theme");
  button.replaceChildren(icon(themeIcons[theme]));
  button.setAttribute("aria-label", t(`theme.${theme}`));
  button.title = t(`theme.${theme}`);
}

function drawWho() {
  const button = document.getElementById("who");
  button.hidden = !state?.rater;
  if (button.hidden) return;
  button.replaceChildren(
    el("span", { class: "mark", "aria-hidden": "true" }, [...state.rater][0].toUpperCase()),
    el("span", { class: "one-line", dir: "auto" }, state.rater),
  );
  button.setAttribute("aria-label", t("who.change", { name: state.rater }));
}

function nextTheme() {
  const now = themes.indexOf(document.documentElement.dataset.theme ?? "auto");
  const theme = themes[(now + 1) % themes.length];
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    // as plain text: theme.js reads it before the modules are here
    if (theme === "auto") localStorage.removeItem("theme");
    else localStorage.setItem("theme", theme);
  } catch {
    /* storage is switched off */
  }
  drawTheme();
  announce(t(`theme.${theme}`));
}

/** Shows the view that the address names; `focus` after a change by the person, not at the first drawing. */
function show({ focus = false } = {}) {
  const name = viewName();
  current?.hide?.();
  current = views[name];
  for (const link of document.querySelectorAll(".tabs a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = t("title", { view: t(name) });
  main.className = `view ${name}`;
  main.replaceChildren();
  current.show(main, { askName });
  if (focus) {
    scrollTo(0, 0);
    main.focus({ preventScroll: true });
  }
}

/** A card that asks for one line of text; `send` throws what is shown beside it. */
function form({ title, text, label, button, value = "", type = "text", send }) {
  const problem = el("p", { class: "problem", role: "alert" });
  const input = el("input", {
    id: "answer",
    type,
    value,
    required: true,
    maxlength: type === "text" ? 100 : 1000,
    autocomplete: type === "text" ? "name" : "current-password",
    dir: "auto",
  });
  const submit = async (event) => {
    event.preventDefault();
    try {
      await send(input.value.trim());
    } catch (error) {
      problem.textContent = error.message;
    }
  };
  const card = el(
    "form",
    { class: "card ask", onsubmit: submit },
    el("h1", {}, title),
    el("p", {}, text),
    el("label", { for: "answer" }, label),
    el("div", { class: "row" }, input, el("button", { class: "primary" }, button)),
    problem,
  );
  main.className = "view";
  main.replaceChildren(card);
  input.focus();
}

function askToken() {
  current?.hide?.();
  current = null;
  const send = async (token) => {
    await postJson("/api/login", { token });
    await start();
  };
  form({
    title: t("login.title"),
    text: t("login.text"),
    label: t("login.token"),
    button: t("login.enter"),
    type: "password",
    send,
  });
}

function askName() {
  current?.hide?.();
  current = null;
  const send = async (name) => {
    if (!name) return;
    await nameRater(name);
    drawWho();
    show({ focus: true });
  };
  form({
    title: t("who.title"),
    text: t("who.text"),
    label: t("who.name"),
    button: t("who.start"),
    value: state.rater ?? store.get("rater") ?? "",
    send,
  });
}

async function start() {
  try {
    await loadState();
  } catch (error) {
    main.replaceChildren(problem(error, start));
    return;
  }
  drawFrame();
  if (state.login) askToken();
  else show();
}

document.querySelector(".tabs").addEventListener("click", clearToast);
document.getElementById("theme").addEventListener("click", nextTheme);
document.getElementById("who").addEventListener("click", askName);
document.getElementById("language").addEventListener("click", () => {
  setLanguage(otherLanguage().code);
  drawFrame();
  if (current) show();
  else start();
});
document.addEventListener("login-needed", () => {
  if (current) askToken();
});
document.querySelector(".skip-link").addEventListener("click", (event) => {
  event.preventDefault(); // the address names the view, and keeps it
  main.focus();
});
addEventListener("hashchange", () => {
  if (state && !state.login) show({ focus: true });
});
addEventListener("unhandledrejection", ({ reason }) =>
  toast(String(reason?.message ?? reason), { error: true }),
);
drawFrame();
start();
