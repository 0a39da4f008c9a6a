// The view in which a person talks to one model, or to two side by side.
import { lines, loadState, post, postJson, state } from "./api.js";
import { composer, controls, drawButton, fill } from "./composer.js";
import { announce, button, el, store, tab, toast } from "./dom.js";
import { toEnd, turnNode, drawAnswer } from "./turns.js";
import { t } from "./words.js";

const EXAMPLE =
  `A long story about a stupid thing

I could use a second opinion. Meet Paul, 21, my son. There we were in the workshop. In June he ruined my ` +
  `necklace, just like that. Funny enough, my coworker Oliver keeps telling me to stop making too much of it. ` +
  `Oh, and at least my globe is still fine. Now I am really angry. How would you make the rules clear?`;

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
  tab.set(
    "turns",
    turns.map((turn) => ({ ...turn, answers: turn.answers.map(kept) })),
  );
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

/* ---- asking ---- */

const busy = () => Boolean(stop);

/** The conversation as one model has seen it: its own answers, where it has given one. A turn that nobody has
 * answered (an error, stopped at once) is left out, since the roles must take turns. */
function historyOf(model, upTo) {
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
  toEnd();
  announce(turn.answers.map(({ name }) => t("chat.writing", { model: name })).join(". "));
  await Promise.all(
    turn.answers.map((answer) =>
      stream(answer, [...historyOf(answer.model, earlier), { role: "user", content: turn.text }]),
    ),
  );
  stop = null;
  drawTurns();
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

/** Asks the last message once more, in place of its answers. */
function again() {
  ask(turns.pop().text);
  root.querySelector("#message").focus();
}

async function queue(index) {
  const messages = [
    ...historyOf(turns[index].answers[0].model, index),
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
  const acts = {
    typed: (text) => {
      typed = text;
    },
    stop: () => stop.abort(),
    ask,
    newChat,
    busy,
  };
  return el(
    "div",
    { class: "chatting" },
    el(
      "div",
      { class: "head" },
      el("div", { class: "grow" }, el("h1", {}, t("chat.title")), el("p", { class: "lead" }, t("chat.lead"))),
      controls(state.models, chosen, settings, () => store.set("models", chosen)),
    ),
    el("h2", { class: "sr", id: "log-title" }, t("chat.log")),
    el("div", { class: "log", role: "region", "aria-labelledby": "log-title" }),
    composer(typed, acts),
  );
}

function drawTurns() {
  if (!root) return;
  const last = busy() ? -1 : turns.length - 1;
  const nodes = turns.map((turn, index) => turnNode(turn, () => queue(index), index === last ? again : null));
  root.querySelector(".log").replaceChildren(...(nodes.length ? nodes : [welcome()]));
  drawButton(root.querySelector(".go"), busy());
}

function welcome() {
  const example = () => {
    const message = root.querySelector("#message");
    fill(message, EXAMPLE);
    message.focus();
  };
  return el(
    "div",
    { class: "welcome" },
    el("img", { src: "/static/icon.svg", alt: "", width: 56, height: 56 }),
    button({ onclick: example }, t("chat.example")),
  );
}
