// The view in which a person talks to one model, or to two side by side.
import { lines, loadState, post, postJson, state } from "./api.js";
import { announce, el, icon, prose, store, tab, toast } from "./dom.js";
import { number, t } from "./words.js";

const NEAR_END = 80; // pixels: who has scrolled up to read is not pulled down again
const EXAMPLE =
  `A long story about a stupid thing

I could use a second opinion. Meet Paul, 21, my son. There we were in the workshop. In June he ruined my ` +
  `necklace, just like that. Funny enough, my coworker Oliver keeps telling me to stop making too much of it. ` +
  `Oh, and at least my globe is still fine. Now I am really angry. How would you make the rules clear?`;
const ICONS = { send: "M5 12h14M13 6l6 6-6 6", stop: "M7 7h10v10H7z", star: "M12 5v14M5 12h14" };

// {text, answers: [{model, name, text, html, ended, score, error, stopped, busy, node}]}, oldest first
const turns = tab.get("turns") ?? [];
const chosen = { model: null, beside: null };
const settings = { temperature: null, length: null };
let stop = null; // the AbortController while answers stream
let typed = tab.get("typed") ?? ""; // what stands in the message field
let root = null;

/** The conversation survives a reload of its tab; an answer that was still coming counts as stopped. */
addEventListener("pagehide", () => {
  const kept = ({ node, busy, stopped, ...answer }) => ({ ...answer, stopped: stopped || busy });
  tab.set("turns", turns.map((turn) => ({ ...turn, answers: turn.answers.map(kept) })));
  tab.set("typed", typed);
});

export function show(main) {
  root = main;
  choose();
  root.replaceChildren(page());
  drawTurns();
  refresh();
}

export function hide() {
  root = null;
}

/** The models that the server has now: a round of training may have added one since the page was loaded. */
async function refresh() {
  const before = JSON.stringify(state.models);
  await loadState();
  if (root && JSON.stringify(state.models) !== before) show(root);
}

/** The models of the address (`#chat/NEW/OLD`, a link of the Train view), else those chosen before. */
function choose() {
  const known = (id) => state.models.find((model) => String(model.id) === String(id))?.id ?? null;
  const [, model, beside] = location.hash.slice(1).split("/");
  if (model) {
    chosen.model = known(model);
    chosen.beside = known(beside);
    history.replaceState(null, "", "#chat");
  }
  const saved = store.get("models") ?? {};
  chosen.model ??= known(saved.model) ?? state.models[0]?.id ?? null;
  if (chosen.beside === null && !model && saved.beside) chosen.beside = known(saved.beside);
}

function keepChoice() {
  store.set("models", chosen);
}

/* ---- asking ---- */

const busy = () => Boolean(stop);

/** The conversation as one model has seen it: its own answers, where it has given one. A turn that nobody has
 * answered (an error, stopped at once) is left out, since the roles must take turns. */
function history_of(model, upTo) {
  const messages = [];
  for (const turn of turns.slice(0, upTo)) {
    const answer = turn.answers.find((other) => other.model === model) ?? turn.answers[0];
    if (!answer.text.trim()) continue;
    messages.push({ role: "user", content: turn.text }, { role: "assistant", content: answer.text });
  }
  return messages;
}

async function ask(text) {
  const ids = [chosen.model, chosen.beside].filter((id) => id !== null);
  if (busy() || !text.trim() || !ids.length) return;
  const names = new Map(state.models.map(({ id, name }) => [id, name]));
  const earlier = turns.length;
  const turn = {
    text: text.trim(),
    answers: ids.map((model) => ({ model, name: names.get(model), text: "", busy: true })),
  };
  turns.push(turn);
  stop = new AbortController();
  drawTurns();
  drawButton();
  toEnd();
  announce(turn.answers.map(({ name }) => t("chat.writing", { model: name })).join(". "));
  await Promise.all(
    turn.answers.map((answer) =>
      stream(answer, [...history_of(answer.model, earlier), { role: "user", content: turn.text }]),
    ),
  );
  stop = null;
  drawTurns();
  drawButton();
}

/** Reads one model's answer into `answer`, piece by piece. */
async function stream(answer, messages) {
  const body = { models: [answer.model], messages };
  if (settings.temperature !== null) body.temperature = settings.temperature;
  if (settings.length !== null) body.max_new_tokens = settings.length;
  try {
    for await (const line of lines(await post("/api/chat", body, stop.signal))) {
      if (line.error) answer.error = line.error;
      else if (line.done)
        Object.assign(answer, line); // the whole text, its HTML, whether it ended, its score
      else answer.text += line.text;
      drawAnswer(answer);
    }
  } catch (error) {
    if (error.name === "AbortError") answer.stopped = true;
    else answer.error = error.message;
  }
  answer.busy = false;
  drawAnswer(answer);
  announce(t("chat.says", { model: answer.name, text: answer.error ?? answer.text }));
}

async function queue(index) {
  const messages = [
    ...history_of(turns[index].answers[0].model, index),
    { role: "user", content: turns[index].text },
  ];
  try {
    const answer = await postJson("/api/queue", { messages });
    const go = {
      text: t("chat.go_rate"),
      run: () => {
        location.hash = "#rate";
      },
    };
    toast(t(answer.new ? "chat.queued" : "chat.queued_before"), { action: go });
  } catch (error) {
    toast(error.message, { error: true });
  }
}

function newChat() {
  stop?.abort();
  turns.length = 0;
  drawTurns();
  root.querySelector("#message").focus();
}

/* ---- drawing ---- */

function page() {
  return el(
    "div",
    { class: "chatting" },
    el(
      "div",
      { class: "head" },
      el("div", { class: "grow" }, el("h1", {}, t("chat.title")), el("p", { class: "lead" }, t("chat.lead"))),
      controls(),
    ),
    el("h2", { class: "sr", id: "log-title" }, t("chat.log")),
    el("div", { class: "log", role: "region", "aria-labelledby": "log-title" }),
    composer(),
  );
}

function controls() {
  const options = (none) => [
    ...(none ? [el("option", { value: "" }, t("chat.nobody"))] : []),
    ...state.models.map(({ id, name }) => el("option", { value: id }, name)),
  ];
  const select = (name, label, none) => {
    const node = el(
      "select",
      {
        id: `chat-${name}`,
        onchange: () => {
          chosen[name] = node.value === "" ? null : state.models[node.selectedIndex - (none ? 1 : 0)].id;
          keepChoice();
        },
      },
      options(none),
    );
    node.value = chosen[name] ?? "";
    return el("div", { class: "field" }, el("label", { for: `chat-${name}` }, label), node);
  };
  return el(
    "div",
    { class: "controls" },
    select("model", t("chat.model"), false),
    select("beside", t("chat.beside"), true),
    sampling(),
  );
}

/** Temperature and length; empty fields leave both to the server. */
function sampling() {
  const input = (name, label, limits) => {
    const node = el("input", {
      id: `chat-${name}`,
      type: "number",
      ...limits,
      oninput: () => {
        settings[name] = node.value === "" || !node.checkValidity() ? null : Number(node.value);
      },
    });
    node.value = settings[name] ?? "";
    return el("div", { class: "field" }, el("label", { for: `chat-${name}` }, label), node);
  };
  return el(
    "details",
    { class: "sampling" },
    el("summary", {}, t("chat.settings")),
    el(
      "div",
      { class: "popover card" },
      input("temperature", t("chat.temperature"), { min: 0, max: 2, step: 0.1, placeholder: "1.0" }),
      input("length", t("chat.length"), { min: 1, max: 4096, step: 1, placeholder: "48" }),
    ),
  );
}

function composer() {
  const submit = (event) => {
    event?.preventDefault();
    if (busy()) {
      stop.abort();
      return;
    }
    const text = field.value;
    if (!text.trim()) return;
    typed = field.value = "";
    fit();
    ask(text);
  };
  const fit = () => {
    // grows with its lines
    field.style.height = "auto";
    field.style.height = `${Math.min(field.scrollHeight + 2, 220)}px`;
  };
  const field = el("textarea", {
    id: "message",
    rows: 1,
    dir: "auto",
    placeholder: t("chat.placeholder"),
    "aria-label": t("chat.message"),
    "aria-describedby": "chat-hint",
    oninput: () => {
      typed = field.value;
      fit();
    },
    onkeydown: (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (!busy()) submit();
      }
    },
  });
  field.value = typed;
  return el(
    "form",
    { class: "composer", onsubmit: submit },
    el("div", { class: "entry" }, field, el("button", { class: "primary go" })),
    el(
      "div",
      { class: "row" },
      el("p", { id: "chat-hint", class: "muted" }, t("chat.hint")),
      el("button", { type: "button", class: "quiet", onclick: newChat }, t("chat.new")),
    ),
  );
}

function drawButton() {
  const button = root?.querySelector(".go");
  button?.replaceChildren(icon(busy() ? ICONS.stop : ICONS.send), t(busy() ? "chat.stop" : "chat.send"));
  button?.classList.toggle("stop", busy());
}

function drawTurns() {
  const log = root?.querySelector(".log");
  if (!log) return;
  log.replaceChildren(...(turns.length ? turns.map(turnNode) : [welcome()]));
  drawButton();
}

function welcome() {
  const example = () => {
    const field = root.querySelector("#message");
    field.value = EXAMPLE;
    field.dispatchEvent(new Event("input"));
    field.focus();
  };
  return el(
    "div",
    { class: "welcome" },
    el("img", { src: "/static/icon.svg", alt: "", width: 56, height: 56 }),
    el("button", { type: "button", onclick: example }, t("chat.example")),
  );
}

function turnNode(turn, index) {
  const answers = turn.answers.map((answer) => {
    answer.node = el("article", { class: "reply", "aria-label": answer.name });
    drawAnswer(answer);
    return answer.node;
  });
  return el(
    "section",
    { class: "exchange" },
    el(
      "div",
      { class: "asked-turn" },
      el("p", { class: "sr" }, t("chat.you")),
      el("div", { class: "bubble plain", dir: "auto" }, turn.text),
    ),
    el("div", { class: `replies of-${answers.length}` }, answers),
    el(
      "div",
      { class: "row after" },
      el(
        "button",
        { type: "button", class: "quiet", onclick: () => queue(index) },
        icon(ICONS.star),
        t("chat.queue"),
      ),
    ),
  );
}

/** An answer: plain text while it comes, the server's HTML at its end. */
function drawAnswer(answer) {
  if (!answer.node) return;
  const follow = nearEnd();
  const notes = [];
  if (answer.score !== null && answer.score !== undefined)
    notes.push(t("chat.score", { score: number(answer.score) }));
  if (answer.stopped) notes.push(t("chat.stopped"));
  else if (!answer.busy && answer.ended === false) notes.push(t("chat.cut"));
  if (answer.shortened) notes.push(t("chat.shortened"));
  const body = answer.html
    ? prose(answer.html)
    : el("div", { class: "prose plain", dir: "auto" }, answer.text);
  answer.node.replaceChildren(
    el(
      "header",
      {},
      el("b", {}, answer.name),
      notes.map((note) => el("span", { class: "note" }, note)),
    ),
    answer.error ? el("p", { class: "problem" }, answer.error) : body,
  );
  answer.node.classList.toggle("busy", Boolean(answer.busy));
  if (follow) toEnd();
}

const nearEnd = () => innerHeight + scrollY > document.documentElement.scrollHeight - NEAR_END;

const toEnd = () => scrollTo(0, document.documentElement.scrollHeight);
