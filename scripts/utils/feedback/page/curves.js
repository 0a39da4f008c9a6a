// The curves of a round of training.
import { lineChart } from "./charts.js";
import { el } from "./dom.js";
import { t } from "./words.js";

const MAIN_CURVES = {
  // names of docs/metrics.md
  sft: ["sft/loss"],
  reward: ["eval/accuracy", "reward/loss"],
  ppo: ["objective/score", "eval/score", "objective/kl", "objective/length"],
};

/** The curves of the stages: the few that tell how it goes, the others behind a summary. */
export function drawCurves(place, curves) {
  const now = JSON.stringify(curves);
  if (now === place.shown) return;
  place.shown = now;
  const open = [...place.querySelectorAll("details[open]")].map((node) => node.dataset.name);
  const stages = Object.keys(MAIN_CURVES).filter((stage) => Object.keys(curves[stage] ?? {}).length);
  place.replaceChildren(
    ...stages.map((stage) => {
      const names = Object.keys(curves[stage]).filter((name) => curves[stage][name].length);
      const main = MAIN_CURVES[stage].filter((name) => names.includes(name));
      const others = names.filter((name) => !main.includes(name)).sort();
      const charts = (chosen) =>
        el(
          "div",
          { class: "charts fine" },
          chosen.map((name) => chart(stage, name, curves[stage][name])),
        );
      return el(
        "section",
        {},
        el("h2", {}, t("train.curves", { stage: t(`train.stage.${stage}`) })),
        charts(main),
        others.length
          ? el(
              "details",
              { "data-name": stage },
              el("summary", {}, t("train.others", { n: others.length })),
              charts(others),
            )
          : null,
      );
    }),
  );
  for (const node of place.querySelectorAll("details")) node.open = open.includes(node.dataset.name);
}

function chart(stage, name, points) {
  const [step, last] = points.at(-1);
  const node = lineChart({
    title: name,
    text: t("train.value", { last, step }),
    points,
    axis: t("train.step"),
    height: 130,
    heading: "h3",
  });
  node.querySelector("details").dataset.name = `${stage} ${name}`;
  return node;
}
