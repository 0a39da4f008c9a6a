// What shows a ranking: the place on each card, the list of places, and which buttons do something.
import { button, el } from "./dom.js";
import * as rankings from "./ranking.js";
import { t } from "./words.js";

/** The name of a place by its rank: 1 is the best. */
const rankName = (rank) => (rank === 1 ? t("rate.best") : t("rate.place", { n: rank }));
/** The rank of a place: the number of answers in better places plus one, as in sports. */
const placeName = ({ groups }, place) => rankName(groups.slice(0, place).flat().length + 1);
const tied = ({ groups }, place) => groups[place].length > 1;

/** The place of a group in words, as in "Place 2, tied". */
export function placeText(ranking, place) {
  const name = placeName(ranking, place);
  return tied(ranking, place) ? t("rate.tied", { place: name }) : name;
}

/** How much of the ranking is left to do. */
export function status(ranking) {
  const count = rankings.left(ranking);
  return count ? t("rate.left", { n: count }) : t("rate.ready");
}

/** Draws what changes with the ranking into the page that `taskPage` made. */
export function drawRanking(page, { task, draft, sending }, acts) {
  const { ranking } = draft;
  const count = rankings.left(ranking);
  page.classList.toggle("sending", sending);
  page.querySelectorAll(".answer").forEach((node, answer) => drawPlace(node, answer, ranking));
  page.querySelector(".rail").replaceChildren(...madePlaces(task, ranking, acts), ...freePlaces(ranking));
  page.querySelector(".status").textContent = sending ? t("rate.sending") : status(ranking);
  const off = {
    tie: !ranking.groups.length || !count,
    back: !ranking.groups.length,
    send: count > 0,
    "all-bad": false,
    skip: false,
  };
  for (const [name, without] of Object.entries(off)) {
    page.querySelector(`.${name}`).setAttribute("aria-disabled", sending || without); // keeps the focus
  }
  page.querySelector(".tie").setAttribute("aria-pressed", ranking.tie);
  for (const level of page.querySelectorAll(".sure button")) {
    level.setAttribute("aria-pressed", Number(level.dataset.level) === draft.confidence);
  }
}

function drawPlace(node, answer, ranking) {
  const place = rankings.placeOf(ranking, answer);
  const placed = place >= 0;
  const words = { n: answer + 1, place: placed ? placeText(ranking, place) : "" };
  node.classList.toggle("placed", placed);
  node.classList.toggle("best", place === 0);
  node.querySelector(".pick").setAttribute("aria-label", t(placed ? "rate.picked" : "rate.pick", words));
  const short = placed ? placeName(ranking, place) : "";
  node.querySelector(".where").textContent = placed && tied(ranking, place) ? `= ${short}` : short;
}

/** The places that have answers, best first; a tie that was asked for shows as a question mark. */
function madePlaces(task, ranking, acts) {
  const { groups, tie } = ranking;
  return groups.map((group, place) => {
    const slot = el(
      "li",
      { class: place ? "slot" : "slot best" },
      el("span", { class: "slot-name one-line" }, placeText(ranking, place)),
      el(
        "div",
        { class: "chips" },
        group.map((answer) => chip(task, answer, placeText(ranking, place), acts)),
        tie && place === groups.length - 1
          ? el("span", { class: "mark asked", "aria-hidden": "true" }, "?")
          : null,
      ),
    );
    slot.style.flexGrow = group.length;
    return slot;
  });
}

/** One free place for each answer that is left. */
function freePlaces(ranking) {
  const placed = ranking.count - rankings.left(ranking);
  return Array.from({ length: rankings.left(ranking) }, (_, index) =>
    el(
      "li",
      { class: "slot free" },
      el("span", { class: "slot-name one-line" }, rankName(placed + index + 1)),
    ),
  );
}

/** An answer's number and its beginning. */
export const chipText = (task, answer) => [
  el("b", {}, String(answer + 1)),
  el("span", { class: "one-line" }, task.answers[answer].text.trim().slice(0, 80) || t("rate.empty")),
];

function chip(task, answer, place, acts) {
  return button(
    {
      class: "chip",
      "data-drag": answer,
      dir: "auto",
      "aria-label": t("rate.chip", { n: answer + 1, place }),
      onkeydown: (event) => chipKey(event, answer, acts),
    },
    chipText(task, answer),
  );
}

/** Arrow keys and Delete on a chip. The focus stays with its answer. */
function chipKey(event, answer, acts) {
  const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
  const focus = (part) => document.querySelector(part).focus();
  if (event.key in steps) {
    acts.shift(answer, steps[event.key]);
    focus(`.chip[data-drag="${answer}"]`);
  } else if (event.key === "Delete") {
    acts.toggle(answer);
    focus(`.answer[data-drag="${answer}"] .pick`);
  } else return;
  event.preventDefault();
  event.stopPropagation();
}
