// The discoveries behind the notifications, read from their resources: only for rows in view (or all, while a search
// needs their words), the newest first, few at a time and not too many a second. A stream of a thousand discoveries a
// second must not become a thousand requests a second from every page that watches it.

const AT_ONCE = 4; // of the browser's six connections: one is the stream's, one is for what the user does
const BURST = 100; // requests that may follow each other at once
const PER_SECOND = 20; // and so many each second after that
const RETRY = 3000;

export class Contents {
  #wanted = new Map(); // event id -> item, in the order in which they were asked for
  #running = 0;
  #tokens = BURST;
  #counted = performance.now();
  #timer = 0;
  #onLoaded;

  /** `onLoaded(item)` is called when `item.discovery` is there, or `item.isGone` says that there is none any more. */
  constructor(onLoaded) {
    this.#onLoaded = onLoaded;
  }

  /** Read it when its turn comes. */
  want(item) {
    if (item.discovery || item.isGone || item.isLoading || !item.path) return;
    this.#wanted.set(item.id, item);
    this.#next();
  }

  /** Nobody looks at it any more. */
  forget(item) {
    this.#wanted.delete(item.id);
  }

  #next() {
    while (this.#running < AT_ONCE && this.#wanted.size && this.#mayAsk()) {
      const item = [...this.#wanted.values()].reduce((best, other) => (other.n > best.n ? other : best));
      this.#wanted.delete(item.id);
      void this.#read(item);
    }
  }

  #mayAsk() {
    const now = performance.now();
    this.#tokens = Math.min(BURST, this.#tokens + ((now - this.#counted) / 1000) * PER_SECOND);
    this.#counted = now;
    if (this.#tokens >= 1) {
      this.#tokens -= 1;
      return true;
    }
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#next(), 1000 / PER_SECOND);
    return false;
  }

  async #read(item) {
    this.#running += 1;
    item.isLoading = true;
    try {
      const query = new URLSearchParams({ event_id: item.id });
      const answer = await fetch(`${item.path}?${query}`, { signal: AbortSignal.timeout(10000) });
      if (answer.ok) item.discovery = (await answer.json()).discoveries[0] ?? null;
      if ((answer.ok && !item.discovery) || (answer.status >= 400 && answer.status < 500)) item.isGone = true;
    } catch {
      // The server is away; what is still looked at then is asked for again.
    }
    item.isLoading = false;
    this.#running -= 1;
    if (item.discovery || item.isGone) this.#onLoaded(item);
    else if (item.isKept) setTimeout(() => item.isKept && this.want(item), RETRY);
    this.#next();
  }
}
