// How a conversation is drawn: what was asked, and the answers below it, side by side.
import { button, el, icon, prose } from "./dom.js";
import { fixed, t } from "./words.js";

const NEAR_END = 80; // pixels: who has scrolled up to read is not pulled down again
const PLUS = "M12 5v14M5 12h14";
const TURN = "M20 12a8 8 0 1 1-3-6.2M20 3v5h-5";

/** One turn; `queue()` puts its prompt into the queue of Rate, `again()`, of the last one, asks it once more. */
export function turnNode(turn, queue, again = null) {
  const answers = turn.answers.map((answer) => {
    answer.node = el("article", { class: "reply card", "aria-label": answer.name });
    drawAnswer(answer);
    return answer.node;
  });
  return el(
    "section",
    { class: "exchange" },
    el("p", { class: "sr" }, t("chat.you")),
    el("div", { class: "bubble plain", dir: "auto" }, turn.text),
    el("div", { class: `replies of-${answers.length}` }, answers),
    el(
      "div",
      { class: "row after" },
      button({ class: "quiet", onclick: queue }, icon(PLUS), t("chat.queue")),
      again && button({ class: "quiet", onclick: again }, icon(TURN), t("chat.again")),
    ),
  );
}

/** Draws an answer into its node: plain text while it comes, the server's HTML at its end. */
export function drawAnswer(answer) {
  if (!answer.node) return;
  const follow = innerHeight + scrollY > document.documentElement.scrollHeight - NEAR_END;
  const body = answer.html
    ? prose(answer.html)
    : el("div", { class: "prose plain", dir: "auto" }, answer.text.trimStart());
  answer.node.replaceChildren(
    el(
      "header",
      { class: "row small" },
      el("b", {}, answer.name),
      notes(answer).map((note) => el("span", { class: "pill" }, note)),
    ),
    answer.error ? el("p", { class: "problem" }, answer.error) : body,
  );
  answer.node.classList.toggle("busy", Boolean(answer.busy));
  if (follow) toEnd();
}

/** What stands beside the model's name: the score, and why the answer is not whole. */
function notes({ score = null, stopped, busy, ended, shortened }) {
  const cut = !stopped && !busy && ended === false;
  return [
    score === null ? null : t("chat.score", { score: fixed(score) }),
    stopped ? t("chat.stopped") : null,
    cut ? t("chat.cut") : null,
    shortened ? t("chat.shortened") : null,
  ].filter(Boolean);
}

export const toEnd = () => scrollTo(0, document.documentElement.scrollHeight);
