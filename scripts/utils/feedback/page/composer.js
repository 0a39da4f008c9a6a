// What stands around a conversation: the models and how they sample above it, the message field below.
import { button, el, icon } from "./dom.js";
import { refuseLong } from "./limits.js";
import { t } from "./words.js";

const ICONS = {
  send: "M5 12h14M13 6l6 6-6 6",
  stop: "M7 7h10v10H7z",
  sampling: "M4 7h9M19 7h1M4 17h1M11 17h9M16 4v6M8 14v6",
};
const MOST = 220; // pixels of the message field's height

const field = (id, label, node) =>
  el("div", { class: "field" }, el("label", { for: id }, label), Object.assign(node, { id }));

/** The two models of `chosen` and the sampling of `settings`; both are changed, `keep()` says so of the models. */
export function controls(models, chosen, settings, keep) {
  const select = (name, label, none) => {
    const node = el(
      "select",
      {
        onchange: () => {
          chosen[name] = models.find(({ id }) => String(id) === node.value)?.id ?? null;
          keep();
        },
      },
      none && el("option", { value: "" }, none),
      models.map((model) => el("option", { value: model.id }, model.name)),
    );
    node.value = chosen[name] ?? "";
    return field(`chat-${name}`, label, node);
  };
  return el(
    "div",
    { class: "controls" },
    select("model", t("chat.model"), null),
    select("beside", t("chat.beside"), t("chat.nobody")),
    sampling(settings),
  );
}

/** Temperature and length; empty fields leave both to the server. */
function sampling(settings) {
  const input = (name, label, limits) => {
    const node = el("input", {
      type: "number",
      placeholder: t("chat.own"),
      ...limits,
      oninput: () => {
        settings[name] = node.value === "" || !node.checkValidity() ? null : Number(node.value);
        node.setAttribute("aria-invalid", String(!node.checkValidity()));
      },
    });
    node.value = settings[name] ?? "";
    return field(`chat-${name}`, label, node);
  };
  const details = el(
    "details",
    {
      class: "sampling",
      onfocusout: ({ relatedTarget }) => {
        if (!details.contains(relatedTarget)) details.open = false; // the person is elsewhere
      },
      onkeydown: ({ key }) => {
        if (key === "Escape") details.open = false;
      },
    },
    el(
      "summary",
      { class: "button", "aria-label": t("chat.settings") },
      icon(ICONS.sampling),
      el("span", {}, t("chat.settings")),
    ),
    el(
      "div",
      { class: "popover card", tabindex: -1 },
      input("temperature", t("chat.temperature"), { min: 0, max: 2, step: 0.1 }),
      input("length", t("chat.length"), { min: 1, max: 4096, step: 1 }),
    ),
  );
  return details;
}

/** The message field with `text`. acts: typed(text), ask(text), stop(), newChat(), busy(). */
export function composer(text, acts) {
  const message = el("textarea", {
    id: "message",
    rows: 1,
    dir: "auto",
    placeholder: t("chat.placeholder"),
    "aria-label": t("chat.message"),
    "aria-describedby": "chat-hint",
    onbeforeinput: refuseLong,
    oninput: () => {
      acts.typed(message.value);
      fit(message);
    },
    onkeydown: (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!acts.busy()) submit();
    },
  });
  const submit = (event) => {
    event?.preventDefault();
    if (acts.busy()) acts.stop();
    else if (message.value.trim()) {
      acts.ask(message.value);
      fill(message, "");
    }
  };
  message.value = text;
  return el(
    "form",
    { class: "bar composer", onsubmit: submit },
    el("div", { class: "entry" }, message, el("button", { class: "primary go" })),
    el(
      "div",
      { class: "row apart below tiny" },
      el("p", { id: "chat-hint", class: "muted" }, t("chat.hint")),
      button({ class: "quiet", onclick: acts.newChat }, t("chat.new")),
    ),
  );
}

/** The message field grows with its lines. */
function fit(message) {
  message.style.height = "auto";
  message.style.height = `${Math.min(message.scrollHeight + 2, MOST)}px`;
}

/** Writes into the message field as if it were typed. */
export function fill(message, text) {
  message.value = text;
  message.dispatchEvent(new Event("input"));
}

/** The one button sends, or stops what is coming. */
export function drawButton(button, busy) {
  button.replaceChildren(icon(busy ? ICONS.stop : ICONS.send), t(busy ? "chat.stop" : "chat.send"));
  button.classList.toggle("stop", busy);
}
