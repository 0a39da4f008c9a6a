// Dragging by mouse, pen or finger: an answer is dropped on a place, between places, or beside them.
import { el } from "./dom.js";

const FAR_ENOUGH = 6; // pixels; less is a click with an unsteady hand
const ENDS = ["pointerup", "pointercancel", "keydown"];
const MARKS = ["drop-before", "drop-with", "drop-after"];

/** Where the point lies in the list of places: {group, side, slot}; null: outside of it. */
function targetAt(rail, x, y) {
  const box = rail.getBoundingClientRect();
  const margin = 16;
  if (x < box.left - margin || x > box.right + margin || y < box.top - margin || y > box.bottom + margin)
    return null;
  const filled = [...rail.querySelectorAll(".slot:not(.free)")];
  const slot = [...rail.children].sort((a, b) => distance(a, x, y) - distance(b, x, y))[0];
  if (slot.classList.contains("free")) return { group: filled.length - 1, side: "after", slot };
  const { left, width } = slot.getBoundingClientRect();
  const part = (x - left) / width;
  return { group: filled.indexOf(slot), side: part < 0.25 ? "before" : part > 0.75 ? "after" : "with", slot };
}

function distance(node, x, y) {
  const box = node.getBoundingClientRect();
  return Math.hypot(Math.max(box.left - x, 0, x - box.right), Math.max(box.top - y, 0, y - box.bottom));
}

/** Text is selected with the mouse and scrolled with the finger; what is left of a card drags it. */
function sourceOf({ target, pointerType, button }) {
  if (button !== 0) return null;
  const handle = pointerType === "mouse" ? target.closest("[data-drag]") : target.closest(".grip, .chip");
  return target.closest(".prose, a") ? null : (handle?.closest("[data-drag]") ?? null);
}

/** Answers below `root` (data-drag: their position) can be dragged into the list `rail()`.
 *
 * `dropped(answer, target)` gets {group, side}, or null where it was dropped beside the list. */
export function dragging(root, { rail, ghost, dropped }) {
  root.addEventListener("pointerdown", (down) => {
    const source = sourceOf(down);
    if (source) follow(down, Number(source.dataset.drag));
  });

  function follow(down, answer) {
    let shadow = null;
    let target = null;
    const clear = () =>
      rail()
        .querySelectorAll(".slot")
        .forEach((slot) => slot.classList.remove(...MARKS));
    const move = (event) => {
      if (event.pointerId !== down.pointerId) return;
      if (!shadow && Math.hypot(event.clientX - down.clientX, event.clientY - down.clientY) < FAR_ENOUGH)
        return;
      if (!shadow) {
        shadow = el("div", { class: "ghost", "aria-hidden": "true", dir: "auto" }, ghost(answer));
        document.body.append(shadow);
        root.classList.add("dragging");
      }
      shadow.style.transform = `translate(${event.clientX}px, ${event.clientY}px)`;
      clear();
      target = targetAt(rail(), event.clientX, event.clientY);
      target?.slot.classList.add(`drop-${target.slot.classList.contains("free") ? "with" : target.side}`);
    };
    const end = (event) => {
      if (event.type === "keydown" ? event.key !== "Escape" : event.pointerId !== down.pointerId) return;
      document.removeEventListener("pointermove", move);
      for (const name of ENDS) document.removeEventListener(name, end);
      if (!shadow) return;
      shadow.remove();
      clear();
      root.classList.remove("dragging");
      swallowClick();
      if (event.type === "pointerup") dropped(answer, target);
    };
    document.addEventListener("pointermove", move);
    for (const name of ENDS) document.addEventListener(name, end);
  }
}

/** The end of a drag must not count as a click on the card below. */
function swallowClick() {
  const swallow = (event) => event.stopPropagation();
  document.addEventListener("click", swallow, { capture: true, once: true });
  setTimeout(() => document.removeEventListener("click", swallow, { capture: true }), 0);
}
