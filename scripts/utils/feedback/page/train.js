// The view that trains on what has been rated: start, stages, log and curves of a round, earlier rounds.
import { getJson, loadState, postJson, state } from "./api.js";
import { table } from "./charts.js";
import { drawCurves } from "./curves.js";
import { announce, button, el, toast } from "./dom.js";
import { moment, number, t } from "./words.js";

const RUNNING = 1500; // milliseconds between two looks at a running round
const IDLE = 10000;

let root = null;
let timer = 0;
let seen = ""; // the last round and its state, so that a change is said

export async function show(main) {
  root = main;
  seen = "";
  root.replaceChildren(
    el(
      "div",
      { class: "head" },
      el(
        "div",
        { class: "grow" },
        el("h1", {}, t("train.title")),
        el("p", { class: "lead" }, t("train.lead")),
      ),
      el("div", { class: "row starter" }),
    ),
    el("p", { class: "problem", role: "alert", id: "train-problem" }),
    el("section", { class: "card now", "aria-labelledby": "now-title", hidden: true }),
    el("div", { class: "curves" }),
    el("section", { class: "card rounds" }),
  );
  await look();
}

export function hide() {
  clearTimeout(timer);
  root = null;
}

async function look() {
  clearTimeout(timer);
  const here = root;
  try {
    const [answer] = await Promise.all([getJson("/api/train"), loadState()]);
    if (root !== here || !root) return;
    problem("");
    draw(answer);
    timer = setTimeout(look, answer.rounds.some(running) ? RUNNING : IDLE);
  } catch (error) {
    if (root !== here || !root) return;
    problem(error.message);
    timer = setTimeout(look, IDLE / 2);
  }
}

const running = (round) => round.state === "running";

function problem(text) {
  const line = root.querySelector("#train-problem");
  if (line.textContent !== text) line.textContent = text;
}

async function act(path, words) {
  try {
    const answer = await postJson(path, {});
    toast(words(answer));
    await look();
  } catch (error) {
    toast(error.message, { error: true });
  }
}

const start = () => act("/api/train", (answer) => t("train.started", { name: answer.round }));

const cancel = () => act("/api/train/cancel", () => t("train.cancelling"));

function draw({ rounds, current }) {
  const newest = [...rounds].sort((a, b) => b.id - a.id);
  const now = newest.find(running);
  drawStarter(now);
  drawNow(now ?? newest[0], current);
  drawRounds(newest);
  say(newest[0]);
}

/** The one button: start, or cancel while a round runs. The node stays, so that the focus does. */
function drawStarter(now) {
  const place = root.querySelector(".starter");
  const { possible, least, rated } = state.training;
  const name = now ? "cancel" : "start";
  let node = place.querySelector("button");
  if (node?.dataset.name !== name) {
    const focused = document.activeElement === node;
    node = button({
      "data-name": name,
      class: now ? "danger" : "primary",
      onclick: () => (node.getAttribute("aria-disabled") === "true" ? null : now ? cancel() : start()),
    });
    place.replaceChildren(
      el("p", { class: "why muted small" }),
      el("a", { class: "button", href: "#rate" }, t("rate.title")),
      node,
    );
    if (focused) node.focus();
  }
  node.textContent = now ? t("train.cancel") : t("train.start", { n: rated });
  node.setAttribute("aria-disabled", String(!now && !possible));
  place.querySelector("a").hidden = now || rated >= least;
  place.querySelector(".why").textContent = now ? "" : reason(state.training);
}

/** Why the button does nothing, or less than one may think. */
function reason({ why, least, full, rated, ranked }) {
  if (why) return why;
  if (rated < least) return t("train.least", { n: least, have: rated });
  return ranked < full ? t("train.few", { n: full }) : "";
}

/** The running or the last round: its stages, its log, its curves. */
function drawNow(round, current) {
  const place = root.querySelector(".now");
  place.hidden = !round;
  if (!round) return;
  if (!place.childElementCount) {
    place.append(
      el("h2", { id: "now-title" }),
      el("ol", { class: "steps row", "aria-label": t("train.steps") }),
      el("p", { class: "problem plain" }),
      el("div", { class: "row next" }),
      el(
        "details",
        { open: true },
        el("summary", {}, t("train.log")),
        el("pre", {
          class: "logtext",
          tabindex: 0,
          role: "log",
          "aria-live": "off",
          "aria-label": t("train.log"),
        }),
      ),
    );
  }
  place.querySelector("h2").textContent = heading(round);
  drawSteps(place.querySelector(".steps"), round, current);
  place.querySelector(".problem").textContent = current?.error ?? "";
  drawNext(place.querySelector(".next"), round);
  drawLog(place, current?.log ?? []);
  drawCurves(root.querySelector(".curves"), current?.curves ?? {});
}

/** Where a finished round leads; what the person is about to press stays where it is. */
function drawNext(place, round) {
  const link = round.state === "finished" ? talk(round) : null;
  if (place.contains(document.activeElement)) return;
  place.replaceChildren(
    ...(link ? [link, el("a", { class: "button", href: "#rate" }, t("train.rate"))] : []),
  );
  link?.classList.add("primary");
}

function heading(round) {
  const seconds = (round.ended ?? Date.now() / 1000) - round.created;
  const words = running(round)
    ? t("train.running", { time: span(seconds) })
    : t(`train.state.${round.state}`);
  return t("train.now", { name: round.name, state: words });
}

function drawSteps(list, round, current) {
  const stages = ["copy", ...(current?.stages ?? []), "done"];
  const at = round.state === "finished" ? stages.length - 1 : Math.max(stages.indexOf(current?.stage), 0);
  list.replaceChildren(
    ...stages.map((stage, index) => {
      const done = index < at || round.state === "finished";
      const here = index === at && !done;
      const failed = here && !running(round);
      return el(
        "li",
        {
          class: `row ${done ? "done" : failed ? "failed" : here ? "here" : ""}`,
          "aria-current": here ? "step" : null,
        },
        el("span", { class: "mark", "aria-hidden": "true" }, done ? "✓" : failed ? "!" : String(index + 1)),
        t(`train.stage.${stage}`),
      );
    }),
  );
}

/** New lines scroll into view, unless the person reads further up. */
function drawLog(place, lines) {
  const log = place.querySelector(".logtext");
  const text = lines.join("\n");
  place.querySelector("details").hidden = !text;
  if (log.textContent === text) return;
  const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 30;
  log.textContent = text;
  if (follow) log.scrollTop = log.scrollHeight;
}

function drawRounds(rounds) {
  const rows = rounds.map((round, index) => [
    round.name,
    moment(round.created),
    number(round.ratings),
    el("span", { class: `pill ${round.state}` }, t(`train.state.${round.state}`)),
    round.ended ? span(round.ended - round.created) : "–",
    (index > 0 && talk(round)) || "–", // the newest one stands above, with its own link
  ]);
  const heads = [
    t("train.round"),
    t("look.time"),
    t("train.ratings"),
    t("train.state"),
    t("train.duration"),
    t("train.action"),
  ];
  const place = root.querySelector(".rounds");
  if (place.contains(document.activeElement)) return; // what the person is about to press stays where it is
  place.replaceChildren(
    el("h2", {}, t("train.rounds")),
    rounds.length ? table(t("train.rounds"), heads, rows) : el("p", { class: "muted" }, t("train.none")),
  );
}

/** A link into the chat: the new model, and beside it the first one. */
function talk(round) {
  const model = state.models.find(({ name }) => name === round.name);
  if (!model) return null;
  const old = state.models.find(({ id }) => id !== model.id);
  return el(
    "a",
    { class: "button", href: `#chat/${model.id}/${old?.id ?? ""}` },
    t("train.talk", { name: round.name }),
  );
}

function span(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  return whole < 60
    ? t("train.seconds", { n: whole })
    : t("train.minutes", { n: Math.floor(whole / 60), s: whole % 60 });
}

/** A round that has started or ended since the last look is said to screen readers. */
function say(round) {
  const now = round ? `${round.id} ${round.state}` : "";
  if (seen && now !== seen)
    announce(t("train.now", { name: round.name, state: t(`train.state.${round.state}`) }));
  seen = now || "none";
}
