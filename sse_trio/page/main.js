// The live page: what the user sees and does, tied to the stream that all tabs share.

import { NO_FILTER, TYPES, filterFromParams, filterParams, parseId, parseUri } from "./discovery.js";
import { Rate } from "./rate.js";
import { ShareForm } from "./share.js";
import { MAX_ROWS, Table } from "./table.js";
import { SharedStream } from "./tabs.js";

const BACKLOG = 100; // the latest discoveries, read when the page opens or its filter changes
const ANNOUNCE = 15000; // at most so often a screen reader hears of new discoveries
const SETTLE = 300; // a filter is used when it has not changed for so long

const $ = (id) => document.getElementById(id);

function stored(key, make) {
  try {
    const value = localStorage.getItem(key) ?? make();
    localStorage.setItem(key, value);
    return value;
  } catch {
    return make(); // no storage for this page: a name for as long as it is open
  }
}

const agentId = stored("sse-trio-agent", () => {
  const words = crypto.getRandomValues(new Uint16Array(2));
  return `page-${Array.from(words, (word) => word.toString(16).padStart(4, "0")).join("")}`;
});

let filter = filterFromParams(new URLSearchParams(location.search));
const counted = { received: 0, missed: 0, isExact: true, unseen: 0 };

// -- the table -----------------------------------------------------------------------------------------------------------

const rate = new Rate($("sparkline"), $("rate"));
const table = new Table($("rows"), { discovery: $("discovery-row"), note: $("note-row") }, {
  onPick: (key, value) => choose(key, [...new Set([...filter[key], value])]),
  onRelate: (item) => shareForm.open({ agentId, relatedTo: item.uri }),
  onSeen: (discovery) => {
    suggest("roles", discovery.agent_role);
    suggest("agents", discovery.agent_id);
  },
  onChange: ({ shown, buffered, newest }) => {
    $("shown").textContent = String(shown);
    $("empty").hidden = shown > 0;
    const isEmpty = !isFiltered();
    $("empty-lead").textContent = isEmpty ? "Waiting for the first discovery" : "No discovery here matches";
    $("empty-hint").hidden = !isEmpty;
    $("buffered").hidden = !buffered;
    $("buffered").textContent = String(buffered);
    if (newest) announceLater(newest);
  },
});

$("kept").textContent = String(MAX_ROWS);

const suggested = { roles: new Set(), agents: new Set() };

function suggest(key, value) {
  if (suggested[key].has(value) || suggested[key].size >= 200) return;
  suggested[key].add(value);
  $(key).append(new Option(value, value));
}

// -- the stream ----------------------------------------------------------------------------------------------------------

const stream = new SharedStream({
  agentId,
  filter,
  onEvents: (events) => {
    const items = events.map(itemOf).filter(Boolean);
    const discoveries = items.filter(({ kind }) => kind === "discovery").length;
    counted.received += discoveries;
    rate.count(discoveries);
    $("received").textContent = String(counted.received);
    $("last-id").textContent = events.findLast(({ id }) => id)?.id ?? $("last-id").textContent;
    if (items.length) table.add(items);
    if (discoveries && (document.hidden || table.isPaused)) {
      counted.unseen += discoveries;
      showTitle();
    }
  },
  onState: showState,
  onServed: (position) => void loadBacklog(position),
});

/** An event as a row of the table, null for what is no row. */
function itemOf({ type, id, data, item }) {
  const base = { id, ...parseId(id), at: new Date() };
  if (type === "discovery") return { kind: "discovery", ...base, ...item };
  if (type === "gap") {
    counted.missed += data.missed ?? 0;
    counted.isExact &&= data.missed !== null;
    const least = counted.isExact ? "" : "at least ";
    $("missed").textContent = `${least}${counted.missed}`;
    $("gaps").textContent = `${least}${counted.missed} missed`;
    $("gaps").hidden = false;
    return { kind: "gap", ...base, data };
  }
  if (type === "connected" && data.resumed !== false && ["lost", "takeover"].includes(data.cause)) {
    const seconds = Math.max(1, Math.round(data.away / 1000));
    const what = data.cause === "lost" ? `Back after ${seconds} s` : "Another tab took over the connection";
    const how = data.resumed ? "resumed, nothing missed" : "the server cannot tell yet whether anything was missed";
    return { kind: "note", note: data.resumed ? "resumed" : "reconnected", ...base, text: `${what}: ${how}.` };
  }
  return null;
}

async function loadBacklog(position) {
  const asked = filter;
  const params = filterParams(asked);
  params.set("limit", String(BACKLOG));
  try {
    const answer = await fetch(`discoveries?${params}`, { signal: AbortSignal.timeout(10000) });
    if (!answer.ok) return;
    const { discoveries, next } = await answer.json();
    if (asked !== filter) return;
    const items = discoveries.map(({ id, uri, discovery }) => {
      return { kind: "discovery", id, ...parseId(id), at: new Date(), uri, ...parseUri(uri), discovery };
    });
    // What is later than the position comes by the stream.
    const isEarlier = ({ epoch, n }) => !position || (epoch === position.epoch && n <= position.n);
    table.merge(items.filter(isEarlier).reverse(), !next);
  } catch {
    // The stream goes on without what was before it.
  }
}

const REFUSALS = {
  401: "The server wants to know who you are (401): sign in, then reload.",
  403: "The server does not let this page listen (403).",
  429: "Too many connections from here (429).",
  503: "The server takes nobody at the moment (503).",
};
const FAREWELLS = {
  shutdown: "The server has stopped.",
  lifetime: "The server ends each connection after a while.",
  overflow: "This page was too slow for the stream.",
  kicked: "An administrator ended this connection.",
  capacity: "The server is full.",
  expired: "The permission to listen has run out.",
};

let said = null;

function showState(state) {
  const isDown = state.state === "live" && state.feed?.isLive === false;
  const feedLost = state.feed?.reason === "unreachable" ? "The server cannot reach NATS" : "The server has lost its own feed";
  const text =
    state.state === "live"
      ? isDown ? "No feed" : table.isPaused ? "Paused" : "Live"
      : { connecting: "Connecting", reconnecting: "Reconnecting", refused: "Turned away" }[state.state];
  const details = {
    live: isDown
      ? `${feedLost} (${state.feed.detail || state.feed.reason}). It goes on trying.`
      : table.isPaused ? "What arrives is held back until you press Resume." : "Discoveries arrive as they are shared.",
    connecting: "Opening the stream.",
    reconnecting: `${FAREWELLS[state.farewell] ?? "The connection is lost."} This page reconnects ${state.farewell === "shutdown" ? "when it is back" : "by itself"}, and continues where it was.`,
    refused: `${REFUSALS[state.status] ?? `The server answered ${state.status}.`} It is tried again.`,
  };
  $("state").dataset.state = state.state;
  $("state").dataset.feed = isDown ? "down" : state.feed?.isLive ? "live" : "unknown";
  $("state-text").textContent = text;
  $("state-detail").textContent = details[state.state];
  $("client-id").textContent = state.clientId ?? "–";
  $("reconnects").textContent = String(state.reconnects);
  $("resumes").textContent = String(state.resumes);
  $("trips").textContent = state.reconnects ? `${state.reconnects}× reconnected, ${state.resumes}× resumed` : "";
  $("tabs").dataset.tab = stream?.isLeading ? "leader" : "follower";
  $("tabs").textContent =
    state.tabs > 1 ? `${state.tabs} share this connection; ${stream?.isLeading ? "this one" : "another one"} holds it` : "only this one";
  if (said !== text) {
    if (said !== null) announce(`${text}. ${details[state.state]}`);
    said = text;
  }
}

// -- filters -------------------------------------------------------------------------------------------------------------

function isFiltered() {
  return filterParams(filter).size > 0 || $("search").value !== "";
}

for (const type of TYPES) {
  const label = document.createElement("label");
  const box = Object.assign(document.createElement("input"), { type: "checkbox", name: "type", value: type });
  const svg = document.querySelector("#share .icon").cloneNode(true);
  svg.querySelector("use").setAttribute("href", `#icon-${type}`);
  label.dataset.type = type;
  label.append(box, svg, type);
  $("types").append(label);
}

/** Change one part of the filter. */
function choose(key, value) {
  filter = { ...filter, [key]: value };
  showFilter();
  table.refilter(filter);
  history.replaceState(null, "", filterParams(filter).size ? `?${filterParams(filter)}` : location.pathname);
  clearTimeout(choose.timer);
  choose.timer = setTimeout(() => (stream.filter = filter), SETTLE);
}

function showFilter() {
  for (const box of $("types").querySelectorAll("input")) box.checked = filter.types.includes(box.value);
  $("confidence").value = String(filter.minConfidence);
  $("confidence-text").textContent = filter.minConfidence ? `≥ ${Math.round(filter.minConfidence * 100)}%` : "any";
  $("confidence").setAttribute("aria-valuetext", filter.minConfidence ? `at least ${Math.round(filter.minConfidence * 100)} percent` : "any");
  const chips = ["roles", "agents"].flatMap((key) => filter[key].map((value) => chip(key, value)));
  $("chips").replaceChildren(...chips);
  const number = filter.types.length + chips.length + (filter.minConfidence ? 1 : 0);
  $("clear").hidden = number === 0;
  $("filter-count").hidden = number === 0;
  $("filter-count").textContent = String(number);
}

function chip(key, value) {
  const [entry, button, name] = ["li", "button", "bdi"].map((tag) => document.createElement(tag));
  const svg = document.querySelector("#share-close .icon").cloneNode(true);
  button.type = "button";
  button.dataset[key] = value;
  button.setAttribute("aria-label", `Remove ${key === "roles" ? "role" : "agent"} ${value} from the filter`);
  name.textContent = value;
  button.append(name, svg);
  button.addEventListener("click", () => {
    choose(key, filter[key].filter((other) => other !== value));
    $(key === "roles" ? "role" : "agent").focus();
  });
  entry.append(button);
  return entry;
}

for (const [id, key] of [["role", "roles"], ["agent", "agents"]]) {
  $(id).addEventListener("change", () => {
    const value = $(id).value;
    $(id).value = "";
    if (value && !filter[key].includes(value)) choose(key, [...filter[key], value]);
  });
}
$("types").addEventListener("change", () => {
  choose("types", [...$("types").querySelectorAll(":checked")].map(({ value }) => value));
});
$("confidence").addEventListener("input", () => choose("minConfidence", Number($("confidence").value)));
$("search").addEventListener("input", () => (table.search = $("search").value));
$("clear").addEventListener("click", () => {
  filter = NO_FILTER;
  choose("types", []);
  $("search").focus();
});
$("toggle-filters").addEventListener("click", () => {
  const isOpen = $("filters").classList.toggle("open");
  $("toggle-filters").setAttribute("aria-expanded", String(isOpen));
});

// -- buttons -------------------------------------------------------------------------------------------------------------

$("pause").addEventListener("click", () => {
  table.isPaused = !table.isPaused;
  $("pause").setAttribute("aria-pressed", String(table.isPaused));
  $("pause-text").textContent = table.isPaused ? "Resume" : "Pause";
  $("pause-icon").setAttribute("href", table.isPaused ? "#icon-play" : "#icon-pause");
  showState(stream.state);
  if (!table.isPaused) showTitle(0);
});

$("reconnect").addEventListener("click", () => stream.reconnect());

$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  root.dataset.theme = isDark ? "light" : "dark";
  try {
    localStorage.setItem("sse-trio-theme", root.dataset.theme);
  } catch {
    // Chosen for as long as the page is open.
  }
});

document.addEventListener("click", (event) => {
  if (!$("connection").contains(event.target)) $("connection").open = false;
});
$("connection").addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  $("connection").open = false;
  $("connection").querySelector("summary").focus();
});

const shareForm = new ShareForm($("share-dialog"), () => announce("Shared."));
$("share").addEventListener("click", () => shareForm.open({ agentId }));

// -- what is said without being looked at ----------------------------------------------------------------------------------

function announce(text) {
  $("announcer").textContent = text;
}

const told = { received: 0, newest: null, timer: 0 };

function announceLater(newest) {
  told.newest = newest;
  told.timer ||= setTimeout(() => {
    const number = counted.received - told.received;
    told.received = counted.received;
    told.timer = 0;
    if (!number) return;
    const what = number === 1 ? "1 new discovery" : `${number} new discoveries`;
    announce(`${what}. The latest: ${told.newest.type} from ${told.newest.agent}.`);
  }, ANNOUNCE);
}

function showTitle(unseen = counted.unseen) {
  counted.unseen = unseen;
  document.title = unseen ? `(${unseen}) Discoveries` : "Discoveries";
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !table.isPaused) showTitle(0);
});

// -- begin ---------------------------------------------------------------------------------------------------------------

$("agent-id").textContent = agentId;
showFilter();
stream.start();
addEventListener("pagehide", () => stream.stop());
addEventListener("pageshow", (event) => event.persisted && stream.start());
