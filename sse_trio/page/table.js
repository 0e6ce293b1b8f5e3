// The table of the newest discoveries. What arrives is put in once per animation frame, however much it is, and less often
// where a frame takes long; only so many rows are kept. So a flood costs the tab no more than a brisk stream. All text
// comes from strangers and is only ever set as text.

import { Contents } from "./contents.js";
import { parseUri, passes } from "./discovery.js";
import { factsOf, hue, icon, quoted, shortened, showTime } from "./row.js";

export const MAX_ROWS = 500;
const SHARE = 4; // putting rows in takes at most one part in so many of the tab's time

const REASONS = {
  overflow: "this page was too slow to take them",
  expired: "they are older than what the server keeps",
  restart: "the server started anew and cannot tell what came in between",
  upstream: "the server had lost its own feed",
};

export class Table {
  #body;
  #templates;
  #handlers;
  #items = []; // oldest first: {kind: "discovery"|"gap"|"note", id, epoch, n, row, …}
  #incoming = [];
  #incomingCount = 0;
  #isWaiting = false; // for the next frame, or after the last one
  #isPaused = false;
  #words = [];
  #byRow = new WeakMap();
  #byUri = new Map();
  #replies = new Map(); // URI -> items that are related to it
  #current = null; // the row that Tab leads to
  #contents = new Contents((item) => this.#loaded(item));
  #sight = new IntersectionObserver((entries) => this.#seen(entries), { rootMargin: "200px" });

  /** `handlers`: onPick(kind, value), onRelate(item), onChange({shown, buffered, newest}), onSeen(discovery). */
  constructor(body, templates, handlers) {
    this.#body = body;
    this.#templates = templates;
    this.#handlers = handlers;
    body.addEventListener("click", (event) => this.#clicked(event));
    body.addEventListener("keydown", (event) => this.#pressed(event));
    body.addEventListener("focusin", (event) => this.#makeCurrent(event.target.closest("tr.discovery")));
  }

  // -- what is in it ---------------------------------------------------------------------------------------------------

  /** Put items in, the newest last: at the next frame, or when the pause ends. */
  add(items) {
    this.#incomingCount += items.filter(({ kind }) => kind === "discovery").length;
    this.#incoming.push(...items);
    if (this.#incoming.length > 2 * MAX_ROWS) this.#incoming.splice(0, this.#incoming.length - MAX_ROWS);
    if (this.#isPaused) this.#changed();
    else this.#schedule();
  }

  #schedule() {
    if (this.#isWaiting || this.#isPaused || !this.#incoming.length) return;
    this.#isWaiting = true;
    requestAnimationFrame((begun) => {
      if (!this.#isPaused) this.#putIn();
      // A message's turn comes when the frame has been laid out and painted: that is what the rows have cost.
      const { port1, port2 } = new MessageChannel();
      port1.onmessage = () => {
        port1.close();
        setTimeout(() => {
          this.#isWaiting = false;
          this.#schedule();
        }, (SHARE - 1) * (performance.now() - begun));
      };
      port2.postMessage(null);
    });
  }

  get isPaused() {
    return this.#isPaused;
  }

  set isPaused(isPaused) {
    this.#isPaused = isPaused;
    this.#schedule();
    this.#changed();
  }

  #putIn() {
    const items = this.#incoming.splice(0).slice(-MAX_ROWS);
    this.#incomingCount = 0;
    const fragment = document.createDocumentFragment();
    for (const item of items) {
      this.#items.push(item);
      fragment.prepend(this.#rowOf(item));
    }
    this.#body.prepend(fragment);
    this.#trim();
    this.#changed(items.findLast(({ kind }) => kind === "discovery"));
  }

  /** Earlier items, oldest first: each goes where its id says. With `isAll` false there were more before them. */
  merge(earlier, isAll) {
    this.#putIn(); // also what a pause held back: it may be later than what comes now
    const [oldest] = earlier;
    if (oldest && !isAll) this.#remove((item) => item.epoch === oldest.epoch && item.n < oldest.n);
    const known = new Set(this.#items.map(({ id }) => id));
    let place = 0;
    for (const item of earlier) {
      if (known.has(item.id)) continue;
      const isLater = (other) => other.epoch === item.epoch && other.n > item.n;
      while (place < this.#items.length && !isLater(this.#items[place])) place += 1;
      const before = this.#items[place - 1]?.row;
      this.#items.splice(place, 0, item);
      if (before) before.before(this.#rowOf(item));
      else this.#body.append(this.#rowOf(item));
      place += 1;
    }
    this.#trim();
    this.#changed();
  }

  /** Keep only what passes the filter for sure; the rest of what does has to be merged in. */
  refilter(filter) {
    const fits = (item) => item.kind !== "discovery" || passes(filter, item) === true;
    this.#incoming = this.#incoming.filter(fits);
    this.#incomingCount = this.#incoming.length;
    this.#remove((item) => !fits(item));
    this.#changed();
  }

  /** Show only rows that have each of the words somewhere. */
  set search(text) {
    this.#words = text.toLowerCase().split(/\s+/).filter(Boolean);
    for (const item of this.#items) {
      this.#hide(item);
      if (this.#words.length) this.#contents.want(item);
    }
    this.#changed();
  }

  #trim() {
    const surplus = this.#items.length - MAX_ROWS;
    if (surplus > 0) for (const item of this.#items.splice(0, surplus)) this.#drop(item);
  }

  #remove(condition) {
    const kept = [];
    for (const item of this.#items) {
      if (condition(item)) this.#drop(item);
      else kept.push(item);
    }
    this.#items = kept;
  }

  #drop(item) {
    item.isKept = false;
    this.#contents.forget(item);
    this.#sight.unobserve(item.row);
    if (item.row === this.#current) this.#current = null;
    item.row.remove();
    item.row = null;
    if (this.#byUri.get(item.uri) === item) this.#byUri.delete(item.uri);
    const target = item.discovery?.related_to;
    if (target) this.#replies.get(target)?.delete(item);
    if (this.#replies.get(target)?.size === 0) this.#replies.delete(target);
  }

  #changed(newest) {
    if (!this.#body.contains(document.activeElement)) this.#makeCurrent(this.#body.querySelector("tr.discovery:not([hidden])"));
    const shown = this.#items.filter(({ kind, row }) => kind === "discovery" && !row.hidden).length;
    const buffered = this.#isPaused ? this.#incomingCount : 0;
    this.#handlers.onChange({ shown, buffered, newest });
  }

  // -- rows ------------------------------------------------------------------------------------------------------------

  #rowOf(item) {
    item.isKept = true;
    if (item.kind !== "discovery") return this.#noteRow(item);
    const row = (item.row = this.#templates.discovery.content.firstElementChild.cloneNode(true));
    this.#byRow.set(row, item);
    this.#byUri.set(item.uri, item);
    row.dataset.eventId = item.id;
    row.querySelector(".agent bdi").textContent = item.agent;
    row.querySelector(".agent .pick").title = `Show only ${item.agent}`;
    row.querySelector(".mark").style.setProperty("--hue", hue(item.agent));
    const badge = row.querySelector(".badge");
    badge.dataset.type = item.type;
    badge.querySelector("use").setAttribute("href", `#icon-${item.type}`);
    badge.lastElementChild.textContent = item.type;
    row.querySelector(".more").setAttribute("aria-label", `Details of ${item.type} from ${item.agent}`);
    showTime(row.querySelector("time"), new Date(item.seconds * 1000));
    if (item.discovery) this.#fill(item);
    else {
      row.dataset.content = "slug";
      row.querySelector(".role .pick").hidden = true;
      row.querySelector(".text").textContent = item.slug.replaceAll("-", " ");
      this.#sight.observe(row);
      if (this.#words.length) this.#contents.want(item);
    }
    this.#showReplies(item);
    this.#hide(item);
    return row;
  }

  /** Role, confidence and content, which stand in the resource. */
  #fill(item) {
    const { row, discovery } = item;
    row.dataset.content = "full";
    row.querySelector(".text").textContent = shortened(discovery.content);
    row.querySelector(".role bdi").textContent = discovery.agent_role;
    row.querySelector(".role .pick").title = `Show only ${discovery.agent_role}`;
    row.querySelector(".role .pick").hidden = false;
    const confidence = Number(discovery.confidence);
    row.querySelector(".meter").style.setProperty("--value", confidence);
    row.querySelector(".number").textContent = `${Math.round(confidence * 100)}%`;
    row.querySelector(".confidence").classList.add("known");
    showTime(row.querySelector("time"), new Date(discovery.timestamp));
    this.#showRelation(item);
    this.#handlers.onSeen(discovery);
  }

  #loaded(item) {
    if (!item.isKept || !item.row) return;
    this.#sight.unobserve(item.row);
    if (item.discovery) this.#fill(item);
    else {
      item.row.dataset.content = "gone";
      item.row.querySelector(".text").title = "The server no longer keeps this discovery: these are its first words";
    }
    if (this.#words.length) {
      this.#hide(item);
      this.#changed();
    }
  }

  #hide(item) {
    if (item.kind !== "discovery") return;
    const { agent, type, slug, discovery } = item;
    const text = this.#words.length
      ? [agent, type, discovery?.agent_role, discovery?.content ?? slug.replaceAll("-", " "), discovery?.related_to].join("\n").toLowerCase()
      : "";
    item.row.hidden = !this.#words.every((word) => text.includes(word));
  }

  #noteRow(item) {
    const row = (item.row = this.#templates.note.content.firstElementChild.cloneNode(true));
    row.className = item.kind;
    showTime(row.querySelector("time"), item.at);
    const words = row.querySelector("span");
    if (item.kind === "gap") {
      const { reason, missed } = item.data;
      row.dataset.reason = reason;
      row.dataset.missed = missed ?? "unknown";
      const number = missed === null ? "Some discoveries may be" : missed === 1 ? "One discovery is" : `${missed} discoveries are`;
      words.textContent = `${number} missing here: ${REASONS[reason] ?? reason}.`;
    } else {
      row.dataset.note = item.note;
      words.textContent = item.text;
    }
    return row;
  }

  // -- relations -------------------------------------------------------------------------------------------------------

  #find(reference) {
    const byId = () => this.#items.findLast(({ id, discoveryId }) => id === reference || discoveryId === reference);
    return this.#byUri.get(reference) ?? byId();
  }

  #showRelation(item) {
    const reference = item.discovery.related_to;
    if (!reference) return;
    const target = this.#find(reference);
    const { path, type, agent } = target ?? parseUri(reference);
    const element = document.createElement(target ? "button" : path ? "a" : "span");
    element.append(icon("link"), "Related to ", quoted(path ? `${type} from ${agent}` : reference));
    element.dataset.relatedTo = reference;
    if (target) {
      element.type = "button";
      element.tabIndex = item.row === this.#current ? 0 : -1;
    } else if (path) {
      element.href = path;
      element.target = "_blank";
      element.rel = "noreferrer";
      element.tabIndex = item.row === this.#current ? 0 : -1;
    }
    item.row.querySelector(".links").prepend(element);
    if (!this.#replies.has(reference)) this.#replies.set(reference, new Set());
    this.#replies.get(reference).add(item);
    if (target) this.#showReplies(target);
  }

  #repliesTo(item) {
    return [item.uri, item.discoveryId, item.id].flatMap((name) => [...(this.#replies.get(name) ?? [])]);
  }

  #showReplies(item) {
    const replies = this.#repliesTo(item);
    let button = item.row.querySelector(".replies");
    if (!replies.length) return;
    if (!button) {
      button = document.createElement("button");
      button.type = "button";
      button.className = "replies";
      button.tabIndex = item.row === this.#current ? 0 : -1;
      item.row.querySelector(".links").append(button);
    }
    button.textContent = replies.length === 1 ? "1 related discovery" : `${replies.length} related discoveries`;
  }

  #jumpTo(item) {
    if (!item?.row) return;
    item.row.hidden = false;
    item.row.classList.remove("found");
    item.row.scrollIntoView({ block: "center" });
    item.row.focus({ preventScroll: true });
    requestAnimationFrame(() => item.row?.classList.add("found"));
  }

  // -- hands and eyes --------------------------------------------------------------------------------------------------

  #seen(entries) {
    for (const { target, isIntersecting } of entries) {
      const item = this.#byRow.get(target);
      if (isIntersecting) this.#contents.want(item);
      else if (!this.#words.length) this.#contents.forget(item);
    }
  }

  #clicked(event) {
    const target = event.target.closest("button");
    const item = this.#byRow.get(event.target.closest("tr"));
    if (!target || !item) return;
    if (target.matches(".agent .pick")) this.#handlers.onPick("agents", item.agent);
    else if (target.matches(".role .pick")) this.#handlers.onPick("roles", item.discovery.agent_role);
    else if (target.matches(".more")) this.#toggle(item);
    else if (target.matches(".replies")) this.#jumpTo(this.#repliesTo(item).at(-1));
    else if (target.matches(".relate")) this.#handlers.onRelate(item);
    else if (target.dataset.relatedTo) this.#jumpTo(this.#find(target.dataset.relatedTo));
  }

  #pressed(event) {
    const row = event.target.closest("tr.discovery");
    const isVisible = (other) => other.matches(".discovery:not([hidden])");
    const rows = () => [...this.#body.children].filter(isVisible);
    let next = null;
    if (event.key === "ArrowDown") next = row ? rows()[rows().indexOf(row) + 1] : rows()[0];
    else if (event.key === "ArrowUp") next = rows()[rows().indexOf(row) - 1];
    else if (event.key === "Home") [next] = rows();
    else if (event.key === "End") next = rows().at(-1);
    else if (event.key === "Enter" && event.target === row) this.#toggle(this.#byRow.get(row));
    else return;
    event.preventDefault();
    next?.focus();
  }

  /** One row at a time is on Tab's way; the arrow keys go from row to row. */
  #makeCurrent(row) {
    if (row === this.#current || !row) return;
    for (const [which, index] of [[this.#current, -1], [row, 0]]) {
      if (!which) continue;
      which.tabIndex = index;
      for (const element of which.querySelectorAll("button, a")) element.tabIndex = index;
    }
    this.#current = row;
  }

  #toggle(item) {
    const { row, discovery } = item;
    const isOpen = row.classList.toggle("expanded");
    row.querySelector(".more").setAttribute("aria-expanded", String(isOpen));
    row.querySelector(".facts")?.remove();
    if (discovery) row.querySelector(".text").textContent = isOpen ? discovery.content : shortened(discovery.content);
    if (isOpen) row.querySelector(".content").append(factsOf(item));
  }
}
