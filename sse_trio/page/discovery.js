// What can be read off a notification, and what a filter lets through. Pure functions.
//
// A notification names a resource: its URI tells the agent, the time, the type and the first words; role, confidence and
// the content stand in the resource. An event's id is `<epoch>-<n>`: within one epoch, n says what came first.

export const TYPES = ["Pattern", "Anomaly", "Connection", "Solution", "Question", "Insight"];

/** The parts of an event id, or null for what is none. */
export function parseId(id) {
  const dash = (id ?? "").lastIndexOf("-");
  const n = Number(id?.slice(dash + 1));
  return dash > 0 && Number.isSafeInteger(n) ? { id, epoch: id.slice(0, dash), n } : null;
}

function decoded(segment) {
  try {
    return decodeURIComponent(segment);
  } catch {
    return segment;
  }
}

/** What `discovery://agents/{agent}/discoveries/{seconds}-{Type}-{slug}` says; another shape is its own slug. */
export function parseUri(uri) {
  const parts = /^discovery:\/\/agents\/([^/?#]+)\/discoveries\/([^/?#]+)$/.exec(uri);
  const name = parts && /^(-?\d+)-([A-Za-z]+)-([^]*)$/.exec(decoded(parts[2]));
  if (!name) return { agent: "", discoveryId: null, path: null, seconds: NaN, type: "", slug: uri };
  return {
    agent: decoded(parts[1]),
    discoveryId: parts[2],
    path: `agents/${parts[1]}/discoveries/${parts[2]}`,
    seconds: Number(name[1]),
    type: name[2],
    slug: name[3],
  };
}

/** Everything passes; each list is a choice of which one must fit, an empty list is no condition. */
export const NO_FILTER = Object.freeze({ types: [], roles: [], agents: [], minConfidence: 0 });

/** A filter as the server's query parameters, in one order: equal filters give equal strings. */
export function filterParams(filter) {
  const params = new URLSearchParams();
  for (const [name, key] of [["type", "types"], ["role", "roles"], ["agent", "agents"]]) {
    for (const value of [...filter[key]].sort()) params.append(name, value);
  }
  if (filter.minConfidence > 0) params.set("min_confidence", String(filter.minConfidence));
  return params;
}

/** The filter in a page's or a stream's query string; what makes no sense there is left out. */
export function filterFromParams(params) {
  const confidence = Number(params.get("min_confidence"));
  return {
    types: [...new Set(params.getAll("type"))].filter((type) => TYPES.includes(type)),
    roles: [...new Set(params.getAll("role"))].filter(Boolean),
    agents: [...new Set(params.getAll("agent"))].filter(Boolean),
    minConfidence: confidence > 0 && confidence <= 1 ? confidence : 0,
  };
}

/** Role and confidence stand in no URI: what decides about them, as a string to compare. */
export function hiddenConditions(filter) {
  return JSON.stringify([[...filter.roles].sort(), filter.minConfidence]);
}

/** The narrowest filter that lets through whatever any of `filters` does. */
export function union(filters) {
  const all = [...filters];
  const joined = (key) =>
    all.some((filter) => filter[key].length === 0) ? [] : [...new Set(all.flatMap((filter) => filter[key]))];
  return {
    types: joined("types"),
    roles: joined("roles"),
    agents: joined("agents"),
    minConfidence: all.length ? Math.min(...all.map((filter) => filter.minConfidence)) : 0,
  };
}

/** Whether the filter lets a discovery through: true, false, or null where only its resource could tell. */
export function passes(filter, { type, agent, discovery }) {
  if (filter.types.length && !filter.types.includes(type)) return false;
  if (filter.agents.length && !filter.agents.includes(agent)) return false;
  if (!filter.roles.length && !filter.minConfidence) return true;
  if (!discovery) return null;
  if (filter.roles.length && !filter.roles.includes(discovery.agent_role)) return false;
  return discovery.confidence >= filter.minConfidence;
}
