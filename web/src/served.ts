/** The part of the page that asks models; it is there where `twofold explore` serves the page. */

import { element, fill } from "./dom";
import { Words, type Key, type Language } from "./messages";

/** What the page is told of its server: src/twofold/exploring/server.py writes it. */
export interface Server {
  readonly page: string;
  readonly original: string;
  readonly task: string;
  readonly asks: boolean;
  readonly chat: boolean;
  readonly answer: number;
  readonly sizes: readonly { readonly name: string; readonly keep: number; readonly bytes: number }[];
}

export interface Token {
  readonly text: string;
  /** None of these for a token that was not predicted, the first one. */
  readonly divergence?: number;
  readonly dense?: number;
  readonly factored?: number;
  readonly best?: readonly [dense: string, factored: string];
}

/** What both models make of a text: src/twofold/exploring/reading.py. */
export interface Reading {
  readonly tokens: readonly Token[];
  readonly mean: number | null;
  readonly same: number;
  readonly next: {
    readonly divergence: number;
    readonly candidates: readonly { readonly text: string; readonly dense: number; readonly factored: number }[];
  };
}

interface Answer {
  readonly dense: string;
  readonly factored: string;
}

interface Result {
  readonly size: string;
  readonly reading: Reading;
  readonly answer: Answer | null;
}

const MOST = 10; // tokens of the table
const THICK = 8; // pixels of the bar under the token that changed most

/** A token whose white space, and whatever else has no sign of its own, can be seen. */
export function visible(text: string): string {
  const shown = text.replace(/ /g, "␣").replace(/\r?\n|\r/g, "↵").replace(/\t/g, "⇥");
  return shown.replace(/\p{C}/gu, (sign) => `U+${sign.codePointAt(0)!.toString(16).toUpperCase().padStart(4, "0")}`) || "∅";
}

/** The places of the tokens that changed most, the largest change first. */
export function mostChanged(tokens: readonly Token[], count: number): number[] {
  const places = tokens.flatMap((token, i) => (token.divergence === undefined ? [] : [i]));
  return places.sort((a, b) => tokens[b]!.divergence! - tokens[a]!.divergence!).slice(0, count);
}

/** The thickness of the bar under each token, in pixels: the largest change has all, none has 0. */
export function thickness(tokens: readonly Token[], most: number): number[] {
  const largest = Math.max(0, ...tokens.map((token) => token.divergence ?? 0));
  return tokens.map(({ divergence }) => (largest > 0 ? Math.round((most * (divergence ?? 0)) / largest) : 0));
}

/** The candidate that a model holds for the most likely. */
export function likeliest({ next }: Reading, model: "dense" | "factored"): string {
  return visible(next.candidates.reduce((best, one) => (one[model] > best[model] ? one : best)).text);
}

/** What went wrong, as a sentence of the table. */
export class Refused extends Error {
  constructor(
    readonly key: Key,
    readonly values: Readonly<Record<string, string | number>> = {},
  ) {
    super(key);
  }
}

class Served {
  private words: Words;
  private result: Result | null = null;
  private asked: AbortController | null = null;

  constructor(
    private readonly root: HTMLElement,
    private readonly server: Server,
    private readonly token: string,
    language: Language,
  ) {
    this.words = new Words(language);
    this.build();
  }

  /** Say all in another language; what was typed and answered stays. */
  speak(language: Language): void {
    const kept = this.server.asks ? { text: this.text.value, size: this.size.value, chat: this.chat } : null;
    this.words = new Words(language);
    this.build();
    if (!kept) return;
    this.text.value = kept.text;
    this.size.value = kept.size;
    if (this.server.chat) this.part<HTMLInputElement>("chat").checked = kept.chat;
    this.link();
    this.show();
  }

  private part<T extends HTMLElement = HTMLElement>(name: string): T {
    return this.root.querySelector<T>(`[data-part="${name}"]`)!;
  }

  private get text(): HTMLTextAreaElement {
    return this.part<HTMLTextAreaElement>("text");
  }

  private get size(): HTMLSelectElement {
    return this.part<HTMLSelectElement>("size");
  }

  private get chat(): boolean {
    return this.server.chat && this.part<HTMLInputElement>("chat").checked;
  }

  private build(): void {
    const { words, server } = this;
    this.root.lang = words.language;
    const heading = element("h2", {}, words.say("served"));
    if (!server.asks) {
      fill(this.root, heading, element("p", {}, words.say("served.alone", { task: server.task })));
      return;
    }
    const options = server.sizes.map(({ name, keep, bytes }) =>
      element("option", { value: name }, words.say("served.option", { name, keep: words.percent(keep), bytes: words.megabytes(bytes) })),
    );
    const text = element("textarea", { id: "models-text", "data-part": "text", rows: 3, spellcheck: "false" });
    text.value = words.say("served.example");
    const form = element(
      "form",
      {},
      element("label", { for: "models-text" }, words.say("served.text")),
      text,
      element(
        "div",
        { class: "row" },
        element("span", {}, element("label", { for: "models-size" }, `${words.say("served.compared")} `), element("select", { id: "models-size", "data-part": "size" }, ...options)),
        server.chat ? element("label", {}, element("input", { type: "checkbox", "data-part": "chat" }), ` ${words.say("served.chat")}`) : null,
        element("button", { type: "submit" }, words.say("served.ask")),
        element("a", { "data-part": "report", hidden: "hidden" }),
      ),
    ); // prettier-ignore
    fill(
      this.root,
      heading,
      element("p", {}, words.say("served.lead", { original: server.original })),
      form,
      element("p", { role: "status", "aria-live": "polite", class: "soft", "data-part": "status" }),
      element("div", { "data-part": "result" }),
    );
    this.size.value = server.page;
    this.size.addEventListener("change", () => this.link());
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      void this.ask();
    });
    text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
  }

  /** Point to the page of the size that is chosen, where this is that of another one. */
  private link(): void {
    const name = this.size.value;
    const link = this.part<HTMLAnchorElement>("report");
    link.hidden = name === this.server.page;
    link.href = `?${new URLSearchParams({ token: this.token, size: name }).toString()}`;
    link.textContent = this.words.say("served.report", { name });
  }

  /** Let both models read the text, and then write on; another question takes the place of one under way. */
  private async ask(): Promise<void> {
    this.asked?.abort();
    const { signal } = (this.asked = new AbortController());
    const asked = { size: this.size.value, text: this.text.value, chat: this.chat };
    this.result = null;
    this.show();
    this.root.setAttribute("aria-busy", "true");
    try {
      this.tell("served.reading");
      const reading = (await this.post("read", asked, signal)) as Reading;
      this.result = { size: asked.size, reading, answer: null };
      this.show();
      this.tell("served.writing", { count: this.server.answer });
      const answer = (await this.post("answer", asked, signal)) as Answer;
      this.result = { size: asked.size, reading, answer };
      this.show();
      const [dense, factored] = [likeliest(reading, "dense"), likeliest(reading, "factored")];
      this.tell("served.done", { dense, factored, name: asked.size });
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused) this.tell(error.key, error.values);
      else this.tell("served.failed", { why: error instanceof Error ? error.message : String(error) });
    }
    this.root.removeAttribute("aria-busy");
  }

  private async post(path: string, asked: object, signal: AbortSignal): Promise<unknown> {
    const query = new URLSearchParams({ token: this.token }).toString();
    const headers = { "content-type": "application/json" };
    const response = await fetch(`${path}?${query}`, { method: "POST", headers, body: JSON.stringify(asked), signal }).catch((error: unknown) => {
      if (signal.aborted) throw error;
      throw new Refused("served.lost");
    });
    if (response.ok) return response.json();
    throw await refusal(response);
  }

  private tell(key: Key, values: Readonly<Record<string, string | number>> = {}): void {
    this.part("status").textContent = this.words.say(key, values);
  }

  private show(): void {
    const { result } = this;
    fill(this.part("result"), ...(result ? [...this.next(result), ...this.answers(result), ...this.changed(result)] : []));
  }

  private next({ reading, size }: Result): Node[] {
    const { words } = this;
    const most = Math.max(...reading.next.candidates.flatMap(({ dense, factored }) => [dense, factored]));
    const bar = (share: number, model: string): Node =>
      element("td", { class: `bar ${model}` }, element("span", { class: "number" }, words.percent(share)), element("i", { style: `width: ${(100 * share) / most}%`, "aria-hidden": "true" }));
    const rows = reading.next.candidates.map(({ text, dense, factored }) =>
      element("tr", {}, element("th", { scope: "row" }, code(text)), bar(dense, "dense"), bar(factored, "factored")),
    );
    return [
      element("h3", {}, words.say("served.next")),
      element("p", { class: "soft" }, words.say("served.next.caption", { nats: words.number(reading.next.divergence) })),
      table([words.say("served.token"), words.say("served.original"), size], rows, "bars"),
    ];
  }

  private answers({ answer, size }: Result): Node[] {
    if (!answer) return [];
    const { words, server } = this;
    const one = (name: string, said: string): Node =>
      element("div", {}, element("b", {}, name), said.trim() ? element("p", {}, said.trim()) : element("p", { class: "soft" }, words.say("served.ended")));
    return [
      element("h3", {}, words.say("served.answers")),
      element("p", { class: "soft" }, words.say("served.answers.caption", { count: server.answer })),
      element("div", { class: "answers" }, one(words.say("served.original"), answer.dense), one(size, answer.factored)),
    ];
  }

  private changed({ reading, size }: Result): Node[] {
    const { words } = this;
    const { tokens, mean, same } = reading;
    const heading = element("h3", {}, words.say("served.changed"));
    if (mean === null) return [heading, element("p", {}, words.say("served.one"))];
    const thick = thickness(tokens, THICK);
    const marked = tokens.map(({ text, divergence }, i) =>
      element(
        "span",
        { class: "token", style: `--thick: ${thick[i]}px` },
        code(text),
        element("small", {}, divergence === undefined ? "–" : words.whole(1000 * divergence)),
      ),
    );
    const rows = mostChanged(tokens, MOST).map((i) => {
      const { text, divergence, dense, factored, best } = tokens[i]!;
      return element(
        "tr",
        {},
        element("th", { scope: "row" }, code(text)),
        ...[String(i + 1), words.number(divergence!), words.percent(dense!), words.percent(factored!)].map((value) => element("td", { class: "n" }, value)),
        ...best!.map((expected) => element("td", { class: "l" }, code(expected))),
      );
    });
    const said = [words.say("served.token"), words.say("served.place"), words.say("served.nats"), words.say("served.given.original"), words.say("served.given.size", { name: size }), words.say("served.best.original"), words.say("served.best.size", { name: size })];
    return [
      heading,
      element("p", {}, words.say("served.mean", { mean: words.number(mean), same, all: tokens.length - 1 })),
      element("p", { class: "soft" }, words.say("served.changed.caption")),
      element("p", { class: "tokens" }, ...marked),
      element("h4", {}, words.say("served.most")),
      element("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": words.say("served.most") }, table(said, rows, "most")),
    ];
  }
}

/** Text of a model: its white space is seen, and its direction is its own. */
function code(text: string): Node {
  return element("bdi", { class: "piece" }, visible(text));
}

function table(head: readonly string[], rows: readonly Node[], kind: string): Node {
  return element(
    "table",
    { class: kind },
    element("thead", {}, element("tr", {}, ...head.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...rows),
  );
}

async function refusal(response: Response): Promise<Refused> {
  const told = (await response.json().catch(() => null)) as { error?: { key?: Key; values?: Record<string, string | number>; message?: string } } | null;
  if (response.status === 503) return new Refused("served.busy");
  if (response.status === 403 || !told?.error) return new Refused("served.lost");
  const { key, values, message } = told.error;
  return key ? new Refused(key, values) : new Refused("served.failed", { why: message ?? String(response.status) });
}

/** Start this part where the page is served; the language is that of the page, and follows it. */
export function startServed(language: Language): void {
  const root = document.getElementById("models");
  const stored = document.getElementById("explorer-server");
  if (!root || !stored) return;
  const token = new URLSearchParams(location.search).get("token") ?? "";
  const served = new Served(root, JSON.parse(stored.textContent ?? "") as Server, token, language);
  document.addEventListener("language", (event) => served.speak((event as CustomEvent<Language>).detail));
}
