// One connection for all tabs of a browser: over HTTP/1.1 a browser opens no more than six to a server.
//
// The tab that holds a Web Lock leads: it has the connection and hands every event on over a BroadcastChannel. It asks the
// server for the union of what the tabs want to see; each tab leaves out what is not for it, and where only the resources
// could tell (tabs that differ in role or confidence) the connection asks for `detail=full`. When the leader goes, the
// lock goes to the next tab. That one asks all others how far they have come, and resumes from the one furthest behind.
// Every tab knows the last id that it has taken, and takes nothing twice: so a hand-over leaves neither hole nor double.
// Where Web Locks or BroadcastChannel are missing (plain HTTP from another host, say) a tab has a connection of its own.

import { filterParams, hiddenConditions, parseId, parseUri, passes, union } from "./discovery.js";
import { Stream } from "./stream.js";

const NAME = `sse-trio/1${new URL(".", location.href).pathname}`;
const LEADER = `${NAME}leader`;
const TAB = `${NAME}tab/`;

const BEAT = 4000; // the leader says so often that it is there, and asks how the server's own feed does
const SILENCE = 9000; // a tab in view that has not heard the leader for so long asks it
const PATIENCE = 2000; // and takes over when it does not answer: the system may have frozen it
const ROLL_CALL = 300; // what a new leader gives the other tabs to answer
const SLEEP = 120000; // a beat so late means that the machine slept: the connection is dead, though nobody noticed

const isShared = "locks" in navigator && "BroadcastChannel" in self;

/** What the connection brings, as a string to compare. */
function key({ filter, full }) {
  return `${filterParams(filter)}${full ? "&detail=full" : ""}`;
}

export class SharedStream {
  state = { state: "connecting", reconnects: 0, resumes: 0, tabs: 1, clientId: null, feed: null };
  isLeading = false;
  #tab = Array.from(crypto.getRandomValues(new Uint32Array(2)), (word) => word.toString(36)).join("");
  #agentId;
  #filter;
  #onEvents;
  #onState;
  #onServed;
  #wants = new Map(); // tab -> {filter, position}: what each tab has said last
  #serving = null; // {filter, full} of the connection that the last `connected` opened
  #isServed = false; // whether that covers what this tab wants
  #position = null; // the last id taken here
  #cursor = null; // the last id that the leader's connection has brought
  #asked = null; // {filter, full} of the connection as it was opened
  #cause = "start";
  #lostAt = 0;
  #outbox = [];
  #doorbell = new MessageChannel(); // its messages are tasks that no background tab slows down, as it does timers
  #channel = null;
  #stream = null;
  #life = null; // aborted when this tab stops taking part
  #queued = null; // aborted to leave the queue for the lock
  #release = null;
  #onWant = null; // while we call the roll
  #heard = 0;
  #beaten = 0;

  /**
   * `onEvents([{type, id, data, item}])`: news for this tab, in order, none twice; a discovery's parts are its `item`.
   * `onState(state)`: the state has changed. `onServed(id)`: from this id on, all that the filter lets through arrives.
   */
  constructor({ agentId, filter, onEvents, onState, onServed }) {
    this.#agentId = agentId;
    this.#filter = filter;
    this.#onEvents = onEvents;
    this.#onState = onState;
    this.#onServed = onServed;
    this.#doorbell.port1.onmessage = () => this.#flush();
  }

  start() {
    this.#life = new AbortController();
    const { signal } = this.#life;
    this.#isServed = false;
    this.#heard = this.#beaten = Date.now();
    this.#stream = new Stream({
      url: () => this.#url(),
      onEvent: (event) => this.#receive(event),
      onState: (state) => this.#connectionIs(state),
    });
    const beat = setInterval(() => void this.#beat(), BEAT);
    signal.addEventListener("abort", () => clearInterval(beat));
    addEventListener("online", () => this.isLeading && this.#stream.open(), { signal });
    if (isShared) void this.#takePart(signal);
    else void this.#lead();
  }

  /** Leave in good order: the others need not find out by themselves. */
  stop() {
    this.#post({ kind: "leave", tab: this.#tab });
    this.#life?.abort();
    this.#stepDown();
    this.#release?.();
    this.#channel?.close();
    this.#channel = null;
  }

  set filter(filter) {
    this.#filter = filter;
    this.#isServed = false;
    this.#want();
  }

  /** Connect anew at once, whatever the wait. */
  reconnect() {
    if (this.isLeading) this.#stream.open();
    else this.#post({ kind: "reconnect" });
  }

  // -- who leads -----------------------------------------------------------------------------------------------------

  async #takePart(signal) {
    this.#channel = new BroadcastChannel(NAME);
    this.#channel.onmessage = ({ data }) => this.#hear(data);
    try {
      await this.#hold(TAB + this.#tab, signal);
      this.#want();
      while (!signal.aborted) await this.#campaign();
    } catch {
      this.#channel?.close();
      this.#channel = null;
      if (!signal.aborted) void this.#lead(); // this page is given no locks after all
    }
  }

  /** Take a lock that nobody else asks for, until the signal; returns when it is held. */
  #hold(name, signal) {
    const end = new Promise((resolve) => signal.addEventListener("abort", resolve));
    return new Promise((resolve, reject) => {
      const held = () => {
        resolve();
        return end;
      };
      navigator.locks.request(name, held).catch(reject);
    });
  }

  /** Wait for the lock, and lead for as long as we hold it: until another tab takes it from us, or we go. */
  async #campaign() {
    const lead = () =>
      new Promise((resolve) => {
        this.#release = resolve;
        void this.#lead();
      });
    try {
      if (this.#queued?.signal.aborted) {
        this.#queued = null;
        await navigator.locks.request(LEADER, { steal: true }, lead);
      } else {
        this.#queued = new AbortController();
        const signal = AbortSignal.any([this.#queued.signal, this.#life.signal]);
        await navigator.locks.request(LEADER, { signal }, lead);
      }
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    } finally {
      this.#stepDown();
    }
  }

  async #lead() {
    this.isLeading = true;
    this.#cause = this.#position ? "takeover" : "start";
    this.#wants.set(this.#tab, { filter: this.#filter, position: null });
    this.#become({ state: "connecting", tabs: this.#wants.size });
    if (this.#channel) await this.#callTheRoll();
    if (!this.isLeading) return;
    this.#cursor = this.#furthestBehind() ?? this.#position;
    this.#stream.open();
  }

  /** Ask every tab for its filter and its position; wait for all that hold a tab's lock, but not for long. */
  async #callTheRoll() {
    const missing = new Set(await this.#livingTabs());
    missing.delete(this.#tab);
    this.#post({ kind: "who" });
    await new Promise((resolve) => {
      setTimeout(resolve, ROLL_CALL);
      this.#onWant = (tab) => missing.delete(tab) && missing.size === 0 && resolve();
      if (missing.size === 0) resolve();
    });
    this.#onWant = null;
    await this.#forgetTheDead();
  }

  async #livingTabs() {
    const { held } = await navigator.locks.query();
    return held.filter(({ name }) => name.startsWith(TAB)).map(({ name }) => name.slice(TAB.length));
  }

  async #forgetTheDead() {
    const known = [...this.#wants.keys()]; // who comes while we ask has taken its lock before it told us
    const living = new Set(await this.#livingTabs());
    for (const tab of known) if (!living.has(tab)) this.#wants.delete(tab);
  }

  /** The position furthest behind ours that a tab has told since this was asked last; null where none is. */
  #furthestBehind() {
    let behind = null;
    for (const want of this.#wants.values()) {
      const { position } = want;
      want.position = null; // from here on it goes with us
      if (position && position.epoch === this.#position?.epoch && position.n < (behind ?? this.#position).n) {
        behind = position;
      }
    }
    return behind;
  }

  #stepDown() {
    if (!this.isLeading) return;
    this.#flush();
    this.#stream.close();
    this.#asked = null;
    this.#lostAt = 0;
    this.isLeading = false;
    this.#onState(this.state);
  }

  async #beat() {
    if (this.isLeading) {
      const slept = Date.now() - this.#beaten > SLEEP;
      this.#beaten = Date.now();
      if (slept) this.#stream.open();
      if (this.#channel) {
        await this.#forgetTheDead();
        this.#adapt();
      }
      await this.#askHealth();
      this.#post({ kind: "state", state: this.state });
    } else if (document.visibilityState === "visible" && Date.now() - this.#heard > SILENCE) {
      const asked = Date.now();
      this.#post({ kind: "ping" });
      setTimeout(() => this.#heard < asked && !this.isLeading && this.#queued?.abort(), PATIENCE);
    }
  }

  // -- the tabs' talk ------------------------------------------------------------------------------------------------

  #post(message) {
    this.#channel?.postMessage(message);
  }

  #want() {
    const [filter, position] = [this.#filter, this.#position];
    this.#wants.set(this.#tab, { filter, position });
    this.#post({ kind: "want", tab: this.#tab, filter, position });
    if (this.isLeading) this.#adapt();
  }

  #hear(message) {
    const { kind, tab } = message;
    if (kind === "want") {
      this.#wants.set(tab, { filter: message.filter, position: message.position });
      if (this.#onWant) this.#onWant(tab);
      else if (this.isLeading) this.#adapt();
    } else if (kind === "leave") {
      this.#wants.delete(tab);
      if (this.isLeading) this.#adapt();
    } else if (kind === "who") {
      this.#want();
    } else if (this.isLeading) {
      if (kind === "ping") this.#post({ kind: "state", state: this.state });
      if (kind === "reconnect") this.#stream.open();
    } else {
      this.#heard = Date.now();
      if (kind === "events") this.#deliver(message.events);
      if (kind === "serving") this.#follow(message);
      if (kind === "state") this.#become(message.state, { isOwn: false });
    }
  }

  /** The leader's: have the connection bring what all tabs want, from where the one furthest behind is. */
  #adapt() {
    if (this.#onWant || !this.#asked) return; // not connected yet: whoever connects asks for the lot
    this.#become({ tabs: this.#wants.size });
    const behind = this.#furthestBehind();
    if (behind) this.#cursor = behind;
    if (behind || key(this.#asked) !== key(this.#needed())) {
      this.#cause = "filter";
      this.#flush();
      this.#stream.open();
    } else if (this.#serving) {
      this.#flush();
      this.#post({ kind: "serving", serving: this.#serving, position: this.#position, state: this.state });
      this.#follow({ serving: this.#serving, position: this.#position });
    }
  }

  /** A connection serves us from `position` on. */
  #follow({ serving, position, state }) {
    if (state) this.#become(state, { isOwn: false });
    this.#serving = serving;
    if (position && position.epoch !== this.#position?.epoch) {
      if (this.#position) {
        this.#onEvents([{ type: "gap", id: position.id, data: { reason: "restart", missed: null } }]);
      }
      this.#position = position;
    } else if (position && this.#position.n < position.n) {
      this.#want();
      return;
    }
    const isCovered =
      key({ filter: union([serving.filter, this.#filter]), full: false }) === key({ ...serving, full: false }) &&
      (serving.full || hiddenConditions(serving.filter) === hiddenConditions(this.#filter));
    if (isCovered && !this.#isServed) {
      this.#isServed = true;
      this.#onServed(this.#position);
    }
  }

  // -- the connection, where we lead ---------------------------------------------------------------------------------

  #needed() {
    const filters = [...this.#wants.values()].map(({ filter }) => filter);
    const full = new Set(filters.map(hiddenConditions)).size > 1;
    return { filter: union(filters), full };
  }

  #url() {
    this.#asked = this.#needed();
    const params = new URLSearchParams({ agent_id: this.#agentId });
    for (const [name, value] of filterParams(this.#asked.filter)) params.append(name, value);
    if (this.#asked.full) params.set("detail", "full");
    if (this.#cursor) params.set("last_event_id", this.#cursor.id);
    return `discoveries/stream?${params}`;
  }

  #receive(event) {
    this.#cursor = parseId(event.id) ?? this.#cursor;
    if (event.type === "connected") {
      const cause = this.#lostAt ? "lost" : this.#cause;
      const away = this.#lostAt ? Date.now() - this.#lostAt : 0;
      this.#lostAt = 0;
      this.#cause = "filter";
      event.data = { ...event.data, cause, away, serving: this.#asked };
      const { reconnects, resumes } = this.state;
      this.#become({
        state: "live",
        status: null,
        farewell: null,
        clientId: event.data.client_id,
        reconnects: reconnects + (cause === "lost" ? 1 : 0),
        resumes: resumes + (cause === "lost" && event.data.resumed ? 1 : 0),
      });
      void this.#askHealth();
    }
    if (event.type === "goodbye") this.#become({ farewell: event.data.reason });
    if (this.#outbox.push(event) === 1) this.#doorbell.port2.postMessage(null);
  }

  #flush() {
    const events = this.#outbox.splice(0);
    if (!events.length) return;
    this.#post({ kind: "events", events });
    this.#deliver(events);
  }

  #connectionIs(change) {
    if (this.state.clientId) this.#lostAt ||= Date.now();
    this.#become(change);
  }

  async #askHealth() {
    let feed = null;
    try {
      const answer = await fetch("health", { cache: "no-store", signal: AbortSignal.timeout(BEAT) });
      const { status, reason, detail } = await answer.json();
      feed = { isLive: status === "healthy", reason: reason ?? null, detail: detail ?? null };
    } catch {
      // Not answered, or by somebody else on the way: the connection's own state says what is to say.
    }
    if (this.isLeading && JSON.stringify(feed) !== JSON.stringify(this.state.feed)) this.#become({ feed });
  }

  /** The state changes by `change`; what the leader says goes to all tabs. */
  #become(change, { isOwn = true } = {}) {
    this.state = { ...this.state, ...change };
    if (isOwn && this.isLeading) this.#post({ kind: "state", state: this.state });
    this.#onState(this.state);
  }

  // -- what this tab takes -------------------------------------------------------------------------------------------

  #deliver(events) {
    const news = [];
    let served = null;
    for (const event of events) {
      if (!this.#isNews(event)) continue;
      if (event.type === "connected") {
        served = { serving: event.data.serving, position: null };
        this.#serving = event.data.serving;
      }
      if (event.type !== "discovery") {
        news.push(event);
        continue;
      }
      const { uri, _meta } = event.data.params;
      const item = { uri, ...parseUri(uri), discovery: _meta?.discovery ?? null };
      const isSame = this.#serving && hiddenConditions(this.#serving.filter) === hiddenConditions(this.#filter);
      if (passes(this.#filter, item) ?? isSame) news.push({ ...event, item });
    }
    if (news.length) this.#onEvents(news);
    if (served) this.#follow(served);
  }

  /** Whether an event lies after all that was taken here; if so, it is taken. */
  #isNews({ type, id, data }) {
    const at = parseId(id);
    if (!at || type === "goodbye") return true;
    if (type === "connected") {
      this.#position ??= at;
      return true;
    }
    const here = this.#position;
    const isOld = here?.epoch === at.epoch && at.n <= here.n;
    // A stream that was made anew under the same name counts from the start again; the gap says so.
    const startsAnew = type === "gap" && data.reason === "restart" && at.n !== here?.n;
    if (isOld && !startsAnew) return false;
    this.#position = at;
    return true;
  }
}
