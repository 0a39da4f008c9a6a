// Ratings on their way to the server: sent again until it has them, also after a reload.
import { postJson } from "./api.js";
import { sleep, store } from "./dom.js";

const WAITS = [1, 2, 4, 8, 15]; // seconds between the attempts

export const put = (rater, body) => store.set("outbox", { rater, body });

/** The rating of this rater that has no answer yet, or null. */
export function left(rater) {
  const kept = store.get("outbox");
  return kept?.rater === rater ? kept.body : null;
}

/** Sends until the server has the rating, and gives its answer; throws what refuses it for good.
 *
 * With the same key, an attempt whose answer was lost or broke off counts once. Before each pause `waits(error, seconds,
 * hurry)` is called, where hurry() ends the pause, and after it `goesOn()`. */
export async function deliver(body, { waits, goesOn }) {
  for (let attempt = 0; ; attempt += 1) {
    try {
      const answer = await postJson("/api/ratings", body);
      store.set("outbox", null);
      return answer;
    } catch (error) {
      if (!error.passing) {
        store.set("outbox", null);
        throw error;
      }
      const seconds = WAITS[Math.min(attempt, WAITS.length - 1)];
      await pause(seconds, (hurry) => waits(error, seconds, hurry));
      goesOn();
    }
  }
}

/** Waits, or less where `hurry` is called or the network comes back. */
async function pause(seconds, tell) {
  const hurried = new Promise((hurry) => {
    addEventListener("online", hurry, { once: true });
    tell(hurry);
  });
  await Promise.race([sleep(seconds * 1000), hurried]);
}
