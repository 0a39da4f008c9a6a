// How much a text field takes.
import { toast } from "./dom.js";
import { t } from "./words.js";

const MOST = 300000; // characters; no model here reads so much, and a browser takes seconds to lay out more

/** For `beforeinput`: what would make a field's text longer is left out as a whole, and the person is told. */
export function refuseLong(event) {
  const { value, selectionStart, selectionEnd } = event.target;
  const more = event.data?.length ?? 0;
  if (more === 0 || value.length - (selectionEnd - selectionStart) + more <= MOST) return;
  event.preventDefault();
  toast(t("field.long", { more, most: MOST }), { error: true });
}
