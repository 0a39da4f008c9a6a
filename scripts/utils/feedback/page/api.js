// The server's routes: JSON in and out, the token against forged requests, lines of a stream.
import { store } from "./dom.js";
import { t } from "./words.js";

/** The server refused (its status and its line), or did not answer (status 0). */
class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }

  /** Whether the same request may succeed later without a change. */
  get passing() {
    return this.status === 0 || this.status === 429 || this.status >= 500;
  }
}

/** The last answer of /api/state; views read it. */
export let state = null;

async function reach(path, options) {
  try {
    return await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, t("error.unreachable"));
  }
}

async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  if (response.status === 401) document.dispatchEvent(new Event("login-needed"));
  throw new ApiError(response.status, body.error ?? t("error.status", { status: response.status }));
}

/** What an answer holds; one that breaks off counts as none. */
async function read(response) {
  if (response.status === 204) return null;
  try {
    return await response.json();
  } catch {
    throw new ApiError(0, t("error.unreachable"));
  }
}

export const getJson = async (path) => read(await checked(await reach(path)));

/** Reads /api/state, and names the rater again where the server was restarted and has forgotten the session. */
export async function loadState() {
  state = await getJson("/api/state");
  const name = store.get("rater");
  if (!state.rater && name && !state.login) await nameRater(name);
  return state;
}

export async function nameRater(name) {
  const { rater } = await postJson("/api/rater", { name });
  state.rater = rater;
  store.set("rater", rater);
}

function send(path, body, signal) {
  const headers = { "Content-Type": "application/json", "X-CSRF-Token": state.csrf };
  return reach(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

/** A POST. After a restart of the server the token is old: it is fetched again, once. */
export async function post(path, body, signal) {
  let response = await send(path, body, signal);
  if (response.status === 403 && path !== "/api/rater") {
    await loadState();
    response = await send(path, body, signal);
  }
  return checked(response);
}

export const postJson = async (path, body) => read(await post(path, body));

/** The objects of an answer that comes line by line. */
export async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    const parts = (rest + (value ?? "")).split("\n");
    rest = done ? "" : parts.pop();
    for (const part of parts) if (part) yield JSON.parse(part);
    if (done) return;
  }
}
