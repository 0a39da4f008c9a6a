// Making elements, saying things to the person, and remembering them between visits.

/** Sets attributes: functions as listeners (`onclick`), true as present, false and null as absent. */
function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
}

/** An element with its attributes and children. A string among the children is text, never markup. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  set(node, attributes);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** A button; in a form it does not send. */
export const button = (attributes, ...children) =>
  el("button", { type: "button", ...attributes }, ...children);

/** The key that does the same as a button; screen readers leave it out. */
export const hint = (key) => el("kbd", { "aria-hidden": "true" }, key);

/** As `el`, for the elements of a drawing. */
export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  set(node, attributes);
  node.append(...children.flat());
  return node;
}

/** A block with HTML that the server made from markdown. Nothing else may reach innerHTML. */
export function prose(html) {
  const node = el("div", { class: "prose", dir: "auto" });
  node.innerHTML = html;
  // code and tables scroll sideways, and the keyboard has to reach what scrolls
  for (const wide of node.querySelectorAll("pre, table")) wide.tabIndex = 0;
  // headings of a text stay below those of the page
  for (const heading of node.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
    set(heading, { role: "heading", "aria-level": 3 });
  }
  for (const link of node.querySelectorAll("a")) set(link, { target: "_blank", rel: "noopener noreferrer" });
  return node;
}

/** An icon from its path on a square of 24. */
export function icon(path) {
  return svg(
    "svg",
    { viewBox: "0 0 24 24", class: "glyph", "aria-hidden": "true" },
    svg("path", { d: path }),
  );
}

/** Says a text to screen readers. */
export function announce(text) {
  const live = document.getElementById("live");
  live.textContent = "";
  setTimeout(() => {
    live.textContent = text;
  }, 50); // an equal text again would not be read
}

let fading = null;

/** Takes a message away that is not about an error. */
export const clearToast = () => document.querySelector(".message:not(.error)")?.remove();

/** Shows a message for a few seconds; `action` is {text, run}. Errors stay until the next message. */
export function toast(text, { action = null, error = false } = {}) {
  const place = document.getElementById("toast");
  clearTimeout(fading);
  const close = () => place.replaceChildren();
  const act = () => {
    close();
    action.run();
  };
  place.replaceChildren(
    el(
      "div",
      { class: error ? "message error" : "message" },
      el("span", { dir: "auto" }, text),
      action && button({ class: "link", onclick: act }, action.text),
      error ? button({ class: "link", onclick: close }, "✕") : null,
    ),
  );
  if (!error) fading = setTimeout(close, 6000);
}

/** Values as JSON in a storage of the browser; null where it is switched off or holds something else. */
const storeIn = (area) => ({
  get(name) {
    try {
      return JSON.parse(area().getItem(name));
    } catch {
      return null;
    }
  },
  set(name, value) {
    try {
      if (value === null) area().removeItem(name);
      else area().setItem(name, JSON.stringify(value));
    } catch {
      /* storage is full or switched off: the page works, a reload forgets */
    }
  },
});

/** What this browser remembers. */
export const store = storeIn(() => localStorage);

/** What this tab remembers until it is closed. */
export const tab = storeIn(() => sessionStorage);

/** A random UUID; `crypto.randomUUID` is missing where the page comes without https. */
export function uuid() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}

export const sleep = (milliseconds) =>
  new Promise((done) => {
    setTimeout(done, milliseconds);
  });
