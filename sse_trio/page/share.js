// The form that shares a discovery. The server judges what is valid; this shows what it says, field by field. Only an empty
// content, which the server would take, is sent back here: in a form it is a slip.

import { TYPES } from "./discovery.js";

const REFUSED =
  "This server takes discoveries only from its own machine, or from those whom a token allows to share. Here you can only watch.";

export class ShareForm {
  #dialog;
  #form;
  #fields;
  #notice;
  #onShared;

  /** `onShared(uri)` is called when the server has taken it. */
  constructor(dialog, onShared) {
    this.#dialog = dialog;
    this.#form = dialog.querySelector("form");
    this.#fields = dialog.querySelector("#share-fields");
    this.#notice = dialog.querySelector("#share-notice");
    this.#onShared = onShared;
    for (const type of TYPES) this.#form.discovery_type.add(new Option(type, type, type === "Insight", type === "Insight"));
    dialog.querySelector("#share-close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#share();
    });
  }

  open({ agentId, relatedTo = "" }) {
    this.#form.agent_id.value ||= agentId;
    this.#form.agent_role.value ||= "Human";
    this.#form.related_to.value = relatedTo;
    this.#say("");
    this.#mark([]);
    this.#dialog.showModal();
    this.#form.content.focus();
  }

  async #post(body) {
    try {
      return await fetch("discoveries", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
        signal: AbortSignal.timeout(15000),
      });
    } catch {
      return null;
    }
  }

  async #share() {
    const values = Object.fromEntries(new FormData(this.#form));
    const confidence = values.confidence.trim();
    // What is no number goes as it is: the server says what is wrong with it.
    values.confidence = confidence !== "" && Number.isFinite(Number(confidence)) ? Number(confidence) : confidence;
    if (!values.related_to.trim()) delete values.related_to;
    if (!values.content.trim()) return this.#mark([{ field: "content", message: "Say what was discovered" }]);
    this.#form.querySelector("#share-submit").disabled = true;
    this.#say("");
    this.#mark([]);
    const answer = await this.#post(values);
    this.#form.querySelector("#share-submit").disabled = false;
    if (!answer) return this.#say("The server does not answer. Nothing was shared.");
    const body = await answer.json().catch(() => ({}));
    if (answer.ok) {
      this.#form.content.value = "";
      this.#dialog.close();
      return this.#onShared(body.uri);
    }
    if (answer.status === 403 || answer.status === 401) return this.#forbid();
    if (Array.isArray(body.errors) && body.errors.length) return this.#mark(body.errors);
    return this.#say(body.detail ?? `The server answered ${answer.status}. Nothing was shared.`);
  }

  #forbid() {
    this.#fields.disabled = true;
    this.#say(REFUSED);
    this.#dialog.querySelector("#share-close").focus();
  }

  #say(text) {
    this.#notice.textContent = text;
    this.#notice.hidden = !text;
  }

  #mark(errors) {
    const rest = [];
    for (const field of this.#form.querySelectorAll("[name]")) {
      const own = errors.filter((error) => error.field === field.name);
      field.toggleAttribute("aria-invalid", false);
      if (own.length) field.setAttribute("aria-invalid", "true");
      this.#form.querySelector(`#error-${field.name}`).textContent = own.map(({ message }) => message).join("; ");
    }
    for (const { field, message } of errors) if (!this.#form.elements[field]) rest.push(`${field}: ${message}`);
    if (rest.length) this.#say(rest.join("; "));
    this.#form.querySelector("[aria-invalid]")?.focus();
  }
}
