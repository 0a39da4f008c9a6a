// The view of what has been rated: figures, agreement, win rates, the newest ratings, export.
import { getJson } from "./api.js";
import { intervalChart, lineChart, table } from "./charts.js";
import { button, el } from "./dom.js";
import { note, problem } from "./notes.js";
import { fixed, moment, number, percent, t } from "./words.js";

let visit = 0;

export async function show(root) {
  visit += 1;
  const here = visit;
  root.replaceChildren(note(t("loading")));
  try {
    const [look, rated] = await Promise.all([getJson("/api/look"), getJson("/api/rated")]);
    if (here === visit) draw(root, look, rated.rows);
  } catch (error) {
    if (here === visit) root.replaceChildren(problem(error, () => show(root)));
  }
}

export function hide() {
  visit += 1;
}

function draw(root, look, rows) {
  const { ranking, all_bad: allBad, skip } = look.kinds;
  const head = el("div", { class: "head" }, el("h1", { class: "grow" }, t("look.title")));
  if (!(ranking + allBad + skip)) {
    const go = el("a", { class: "button primary", href: "#rate" }, t("rate.title"));
    root.replaceChildren(head, el("div", { class: "card ask" }, el("p", {}, t("look.none")), go));
    return;
  }
  root.replaceChildren(
    head,
    tiles(look),
    el(
      "div",
      { class: "charts" },
      policies(look.policies),
      curve(look.curve),
      rewardCurve(look.reward_curve),
    ),
    raters(look.raters),
    newest(rows),
    exports(),
  );
}

/** A share in words: 71 %, and its interval with the number of pairs. */
const interval = ({ low, high, pairs }) =>
  t("look.share", { low: percent(low), high: percent(high), n: pairs });

const has = (share) => Boolean(share?.pairs);

function tiles(look) {
  const tile = (name, value, note = null) =>
    el(
      "div",
      { class: "tile card" },
      el("dt", { class: "muted small" }, name),
      el("dd", {}, el("b", {}, value), note && el("span", { class: "muted tiny" }, note)),
    );
  const share = (name, value) =>
    has(value) ? tile(name, percent(value.rate), interval(value)) : tile(name, "–", t("look.no_pairs"));
  const kinds = ["ranking", "all_bad", "skip", "edits"].map((kind) =>
    tile(t(`look.kinds.${kind}`), number(look.kinds[kind])),
  );
  return el(
    "dl",
    { class: "tiles" },
    kinds,
    share(t("look.agreement"), look.agreement),
    share(t("look.reward_model"), look.reward_model),
  );
}

function policies(list) {
  if (!list.length) return null;
  const rows = [...list].filter((policy) => policy.win_rate !== null).sort((a, b) => b.win_rate - a.win_rate);
  if (!rows.length)
    return el(
      "section",
      { class: "card" },
      el("h2", {}, t("look.policies")),
      el("p", { class: "muted" }, t("look.one_model")),
    );
  const values = table(
    t("look.policies"),
    [t("look.model"), t("look.win_rate"), t("look.interval"), t("look.rankings")],
    rows.map(({ name, win_rate: rate, low, high, rankings }) => [
      name,
      percent(rate),
      `${percent(low)} – ${percent(high)}`,
      number(rankings),
    ]),
  );
  return intervalChart({
    title: t("look.policies"),
    text: t("look.policies_text"),
    table: values,
    rows: rows.map(({ name, win_rate: value, low, high }) => ({ name, value, low, high })),
  });
}

function curve(points) {
  if (!points.length) return null;
  const words = { first: moment(points[0][0]), last: moment(points.at(-1)[0]), n: points.at(-1)[1] };
  return lineChart({
    title: t("look.curve"),
    text: t("look.curve_text", words),
    points,
    axis: t("look.time"),
    time: true,
    steps: true,
  });
}

function rewardCurve(points) {
  if (points.length < 2) return null;
  return lineChart({
    title: t("look.reward_curve"),
    text: t("look.reward_curve_text"),
    points: points.map(([time, share]) => [time, Math.round(100 * share)]),
    axis: t("look.time"),
    time: true,
  });
}

function raters(list) {
  const rows = list.map(({ name, rated, self }) => [
    name,
    number(rated),
    has(self) ? `${percent(self.rate)} (${interval(self)})` : t("look.no_pairs"),
  ]);
  return el(
    "section",
    { class: "card" },
    el("h2", {}, t("look.raters")),
    table(t("look.raters"), [t("look.rater"), t("look.rated"), t("look.with_self")], rows),
  );
}

/** The newest ratings, best answer first; a button brings 20 older ones. */
function newest(rows) {
  const list = el("ul", { class: "rated" }, rows.map(rating));
  const older = button(
    {
      class: "older",
      hidden: rows.length < 20,
      onclick: async () => {
        const more = await getJson(`/api/rated?before=${encodeURIComponent(rows.at(-1).id)}`);
        rows.push(...more.rows);
        list.append(...more.rows.map(rating));
        older.hidden = more.rows.length < 20;
      },
    },
    t("look.older"),
  );
  return el("section", { class: "card" }, el("h2", {}, t("look.newest")), list, older);
}

/** A prompt is a text, or messages of which the last one counts most. */
const promptText = (prompt) =>
  typeof prompt === "string"
    ? prompt
    : (prompt.messages ?? prompt).map((message) => message.content).join("\n\n");

/** The beginning of a prompt for a list; of a post in the layout of TL;DR its title and how it begins. */
const gist = (text) =>
  text
    .replace(/^SUBREDDIT: \S+\s+TITLE: /, "")
    .replace(/\s+POST: /, " · ")
    .slice(0, 160);

function rating({ rater, time, kind, prompt, answers, better }) {
  const text = promptText(prompt);
  const reward = ({ score }) => (score === null ? [] : [t("chat.score", { score: fixed(score) })]);
  const sorted = [...answers].sort((a, b) => (a.rank ?? 0) - (b.rank ?? 0));
  const words = (answer) =>
    el(
      "li",
      {},
      el("span", { class: "mark" }, answer.rank ?? "–"),
      el("span", { class: "plain", dir: "auto" }, answer.text.trim()),
      el("span", { class: "muted tiny", dir: "auto" }, [answer.policy, ...reward(answer)].join(" · ")),
    );
  return el(
    "li",
    {},
    el(
      "details",
      {},
      el(
        "summary",
        {},
        el("span", { class: `pill ${kind}` }, t(`look.kind.${kind}`)),
        el("span", { class: "one-line", dir: "auto" }, gist(text)),
        el("span", { class: "muted tiny", dir: "auto" }, `${rater} · ${moment(time)}`),
      ),
      el("p", { class: "plain whole", dir: "auto" }, text),
      el("ul", { class: "ranked" }, sorted.map(words)),
      better ? el("p", { class: "plain", dir: "auto" }, el("b", {}, `${t("look.better")}: `), better) : null,
    ),
  );
}

function exports() {
  const names = ["jsonl", "edits", "argilla", "label_studio"];
  return el(
    "section",
    { class: "card" },
    el("h2", {}, t("look.export")),
    el(
      "ul",
      { class: "row" },
      names.map((name) =>
        el(
          "li",
          {},
          el("a", { class: "button", href: `/api/export/${name}`, download: "" }, t(`look.export.${name}`)),
        ),
      ),
    ),
  );
}
