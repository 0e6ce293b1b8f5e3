// One connection to the server's stream, kept for as long as it is wanted.
//
// A native EventSource comes back by itself after a cut or a clean end, with Last-Event-ID. After anything but a 200 it
// is closed for good: then a new one is made, from the last event's id, with growing, jittered waits. The caller owns the
// cursor: it names it whenever a new EventSource is made, and moves it with each event that it is handed.

const FIRST_WAIT = 1000;
const LONGEST_WAIT = 30000;
const EVENTS = ["connected", "discovery", "gap", "cursor", "goodbye"];

export class Stream {
  #source = null;
  #timer = 0;
  #failures = 0;
  #farewell = null;
  #url;
  #onEvent;
  #onState;

  /** `url()` is asked for each new EventSource; `onEvent({type, id, data})` and `onState({state, …})` are told. */
  constructor({ url, onEvent, onState }) {
    this.#url = url;
    this.#onEvent = onEvent;
    this.#onState = onState;
  }

  /** Connect now, from the caller's cursor; a connection that is there already ends first. */
  open() {
    this.close();
    const url = this.#url();
    const source = (this.#source = new EventSource(url));
    for (const type of EVENTS) source.addEventListener(type, (event) => this.#receive(type, event));
    source.addEventListener("error", () => {
      if (source !== this.#source) return;
      if (source.readyState === EventSource.CLOSED) void this.#refused(url);
      else this.#onState({ state: "reconnecting", farewell: this.#farewell });
    });
  }

  close() {
    clearTimeout(this.#timer);
    this.#source?.close();
    this.#source = null;
  }

  #receive(type, event) {
    let data;
    try {
      data = JSON.parse(event.data);
    } catch {
      return;
    }
    if (type === "goodbye") this.#farewell = data.reason;
    if (type === "connected") {
      this.#failures = 0;
      this.#farewell = null;
    }
    this.#onEvent({ type, id: event.lastEventId, data });
  }

  /** EventSource does not tell why it was turned away; HEAD on the same address does. */
  async #refused(url) {
    this.#source = null;
    const wait = Math.min(LONGEST_WAIT, FIRST_WAIT * 2 ** this.#failures++) * (0.5 + Math.random() / 2);
    this.#timer = setTimeout(() => this.open(), wait);
    this.#onState({ state: "reconnecting", farewell: this.#farewell });
    try {
      const headers = { Accept: "text/event-stream" };
      const answer = await fetch(url, { method: "HEAD", headers, signal: AbortSignal.timeout(5000) });
      if (!this.#source && !answer.ok) this.#onState({ state: "refused", status: answer.status });
    } catch {
      // Nobody answers at all, which the state says already.
    }
  }
}
