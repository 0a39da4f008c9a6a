// Words in the person's language; numbers and times as that language writes them.
import chinese from "./chinese.js";
import { store } from "./dom.js";
import english from "./english.js";

const dictionaries = { en: english, zh: chinese };

/** "en" or "zh": what was chosen here, else the browser's first language that we have. */
export let language = chosen();

function chosen() {
  const wanted = [store.get("language"), ...navigator.languages.map((tag) => tag.slice(0, 2))];
  return wanted.find((tag) => tag in dictionaries) ?? "en";
}

/** The other language, and its own name. */
export function otherLanguage() {
  const code = language === "en" ? "zh" : "en";
  return { code, name: dictionaries[code].name };
}

export function setLanguage(code) {
  language = code;
  store.set("language", code);
}

/** The language as the person's region writes numbers and times: "en-GB" for 24 hours and the day first. */
const locale = () => navigator.languages.find((tag) => tag.startsWith(language)) ?? language;

/** The words of a key, with values for its {names}; `n` also chooses between the forms one and other. */
export function t(key, values = {}) {
  const entry = dictionaries[language][key];
  if (entry === undefined) throw new Error(`no words for ${key}`);
  const form = new Intl.PluralRules(language).select(Number(values.n ?? 0));
  const text = typeof entry === "string" ? entry : (entry[form] ?? entry.other);
  return text.replace(/\{(\w+)\}/g, (_, name) =>
    typeof values[name] === "number" ? number(values[name]) : values[name],
  );
}

export const number = (value, digits = 3) =>
  new Intl.NumberFormat(locale(), {
    maximumSignificantDigits: Math.max(digits, String(Math.trunc(value)).length),
  }).format(value);

/** A number with two decimals, for what is compared. */
export const fixed = (value) =>
  new Intl.NumberFormat(locale(), { minimumFractionDigits: 2, maximumFractionDigits: 2 }).format(value);

export const percent = (value) =>
  new Intl.NumberFormat(locale(), { style: "percent", maximumFractionDigits: 0 }).format(value);

/** A time in seconds since 1970 as date and time of day. */
export const moment = (seconds) =>
  new Intl.DateTimeFormat(locale(), { dateStyle: "medium", timeStyle: "short" }).format(seconds * 1000);
