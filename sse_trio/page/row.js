// The parts of a row: elements made from what strangers sent, which is only ever set as text.

const SHORT = 1000; // characters of a content that a folded row holds

const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const calendar = new Intl.DateTimeFormat(undefined, { dateStyle: "medium" });
const exact = new Intl.DateTimeFormat(undefined, { dateStyle: "full", timeStyle: "long" });

/** A moment: its time of day, the date where that is another day, and all of it as a title. */
export function showTime(element, date) {
  if (Number.isNaN(date.getTime())) {
    element.textContent = "–";
    return;
  }
  element.dateTime = date.toISOString();
  element.title = exact.format(date);
  element.textContent = clock.format(date);
  if (date.toDateString() !== new Date().toDateString()) {
    const day = document.createElement("span");
    day.textContent = calendar.format(date);
    element.append(day);
  }
}

/** The beginning of a text, never half a character. */
export function shortened(text) {
  if (text.length <= SHORT) return text;
  const cut = /[\uD800-\uDBFF]/.test(text[SHORT - 1]) ? SHORT - 1 : SHORT;
  return `${text.slice(0, cut)}…`;
}

/** One colour for an agent, the same on every page, and far from those of agents with similar names. */
export function hue(name) {
  let hash = 2166136261; // FNV-1a
  for (const character of name) hash = Math.imul(hash ^ character.codePointAt(0), 16777619);
  const mixed = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  return Math.floor(((mixed >>> 0) / 2 ** 32) * 360);
}

/** One of the symbols in the page. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A stranger's text in the middle of ours, whatever its direction. */
export function quoted(text) {
  const bdi = document.createElement("bdi");
  bdi.textContent = text;
  return bdi;
}

/** What there is to know about a discovery beside the columns, and what can be done with it. */
export function factsOf(item) {
  const [facts, list] = [document.createElement("div"), document.createElement("dl")];
  facts.className = "facts";
  const inColumns = new Set(["agent_id", "agent_role", "discovery_type", "content", "confidence", "timestamp", "related_to"]);
  const more = Object.entries(item.discovery ?? {}).filter(([name]) => !inColumns.has(name));
  const known = [
    ["Resource", item.uri],
    ["Event id", item.id],
    ["Timestamp", item.discovery?.timestamp],
    ["Confidence", item.discovery?.confidence],
    ["Related to", item.discovery?.related_to],
    ...more.map(([name, value]) => [name, typeof value === "string" ? value : JSON.stringify(value)]),
  ];
  for (const [name, value] of known) {
    if (value === undefined || value === null) continue;
    const [term, description] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    description.dir = "auto";
    description.textContent = String(value);
    list.append(term, description);
  }
  const buttons = document.createElement("div");
  buttons.className = "buttons";
  const relate = document.createElement("button");
  relate.type = "button";
  relate.className = "button relate";
  relate.textContent = "Share a related one";
  buttons.append(relate);
  if (item.path) {
    const raw = document.createElement("a");
    raw.className = "button";
    raw.href = `${item.path}?${new URLSearchParams({ event_id: item.id })}`;
    raw.target = "_blank";
    raw.rel = "noreferrer";
    raw.textContent = "Open as JSON";
    buttons.append(raw);
  }
  facts.append(list, buttons);
  return facts;
}
