/** The live part of the report: a budget that is planned anew in the page. */

import "./style.css";
import { cells, curve, Heatmap, metrics, shareOf, storage, water, type Labelled, type Point } from "./charts";
import { unpack, type Data, type Metric, type Spectrum, type Stored, type Weight } from "./data";
import { element, fill } from "./dom";
import { Words, type Key, type Language } from "./messages";
import { Planner, type Planned } from "./planner";
import { startServed } from "./served";

const STEPS = 200; // of the slider
const SIZES = 24; // points of the curve
const PAUSE = 80; // milliseconds without a new plan, after which all figures are drawn
const METRICS: readonly Metric[] = ["plain", "inputs", "both"];

/** What the page shows, and what it has been asked for. */
class Explorer {
  private readonly planner: Planner;
  private readonly bytes: boolean;
  /** From Σσ² to what is shown: half of it is in nats. */
  private readonly factor: number;
  private words: Words;
  private planned: Planned;
  private chosen = 0;
  private metric: Metric = "plain";
  private points: Point[] = [];
  private map: Heatmap | null = null;
  private wanted = 0;
  private waiting = false;
  private later = 0;

  constructor(
    private readonly root: HTMLElement,
    private readonly data: Data,
    language: Language,
  ) {
    this.planner = new Planner(data);
    this.bytes = data.unit === "bytes";
    this.factor = data.nats ? 0.5 : 1;
    this.words = new Words(language);
    this.planned = this.planner.plan(data.amount);
    const shown = data.weights.flatMap((weight, i) => (this.spectraOf(weight).length > 0 ? [i] : []));
    this.chosen = shown[shown.length >> 1] ?? 0;
    this.build();
    void this.trace();
    new ResizeObserver(() => this.draw()).observe(root);
  }

  /** What an amount is called where the user sees it: percent of the factorized weights, or MB of the whole model. */
  private shown(amount: number): number {
    return this.bytes ? (amount + this.data.rest.bytes) / 1e6 : (100 * amount) / this.data.before.numbers;
  }

  private amount(shown: number): number {
    return this.bytes ? shown * 1e6 - this.data.rest.bytes : (shown / 100) * this.data.before.numbers;
  }

  private part<T extends HTMLElement = HTMLElement>(name: string): T {
    return this.root.querySelector<T>(`[data-part="${name}"]`)!;
  }

  /** Make all that does not change with the plan, in the language of the moment. */
  private build(): void {
    const { words, data, planner } = this;
    const say = (key: Key, values?: Record<string, string | number>): string => words.say(key, values);
    const [low, high] = planner.range;
    const slider = element("input", {
      type: "range", id: "size", "data-part": "slider", min: 0, max: STEPS, step: 1,
      value: Math.round((STEPS * (this.planned.amount - low)) / (high - low)),
    }); // prettier-ignore
    const number = element("input", {
      type: "number", "data-part": "number", "aria-label": `${say(this.bytes ? "budget" : "keep")}, ${say(this.bytes ? "megabytes" : "percent")}`,
      min: ceil(this.shown(low)), max: floor(this.shown(high)), step: "any", value: round(this.shown(this.planned.amount)),
    }); // prettier-ignore
    const choose = element("select", { id: "weight", "data-part": "choose" });
    data.weights.forEach((weight, i) => choose.append(element("option", { value: i }, weight.names[0])));
    choose.value = String(this.chosen);
    const language = element("button", { type: "button", class: "language", lang: words.language === "en" ? "es" : "en" }, say("language"));
    this.root.lang = words.language;
    fill(
      this.root,
      language,
      element("h2", {}, say("explore")),
      element("p", {}, say("explore.lead")),
      data.thin > 1 ? element("p", {}, say("explore.thin", { thin: data.thin })) : null,
      element(
        "div",
        { class: "size" },
        element("label", { for: "size" }, say(this.bytes ? "budget" : "keep")),
        element("div", { class: "both" }, slider, number, element("span", { "aria-hidden": "true" }, this.bytes ? "MB" : "%")),
      ),
      element("dl", { class: "tiles", "data-part": "tiles", "aria-live": "polite" }),
      element("h3", {}, say("map")),
      element("figure", {}, element("div", { class: "scroll", "data-part": "map", tabindex: 0, role: "group", "aria-label": say("map") }), element("figcaption", {}, say("map.caption"))),
      element("details", { "data-part": "details" }, element("summary", {}, say("table")), element("div", { class: "scroll", "data-part": "table", tabindex: 0, role: "group", "aria-label": say("table") })),
      element("h3", {}, say("curve")),
      element("figure", {}, element("div", { "data-part": "curve" }), element("figcaption", {}, say("curve.caption"))),
      element("div", { class: "scroll", "data-part": "beside", tabindex: 0, role: "group", "aria-label": say("beside") }),
      element("p", { "data-part": "verdict" }),
      element("h3", {}, say("weight")),
      element("p", {}, element("label", { for: "weight" }, `${say("weight.choose")} `), choose),
      element("p", { "data-part": "state" }),
      element("h4", {}, say("metrics")),
      element("p", {}, say("metrics.lead")),
      element("fieldset", { "data-part": "choices" }, element("legend", {}, say("metrics.choose")), ...METRICS.map((metric) => this.choice(metric))),
      element("figure", {}, element("div", { "data-part": "metrics" }), element("figcaption", { "data-part": "metrics-words" })),
      element(
        "div",
        { class: "pair" },
        element("figure", {}, element("h4", {}, say("water")), element("div", { "data-part": "water" }), element("figcaption", {}, say("water.caption"))),
        element("figure", {}, element("h4", {}, say("even")), element("div", { "data-part": "even" }), element("figcaption", { "data-part": "even-words" })),
      ),
      element("h3", {}, say("recipe")),
      element("p", {}, say("recipe.caption")),
      element("p", {}, element("button", { type: "button", "data-part": "save" }, say("recipe.save"))),
      element("pre", { "data-part": "recipe", tabindex: 0 }),
    ); // prettier-ignore
    language.addEventListener("click", () => {
      this.words = new Words(words.language === "en" ? "es" : "en");
      this.build();
      document.dispatchEvent(new CustomEvent<Language>("language", { detail: this.words.language }));
      this.part<HTMLElement>("slider").focus();
    });
    slider.addEventListener("input", () => this.ask(low + ((high - low) * Number(slider.value)) / STEPS, number));
    number.addEventListener("change", () => this.ask(this.amount(Number(number.value)), number));
    choose.addEventListener("change", () => this.choose(Number(choose.value)));
    this.part("details").addEventListener("toggle", () => this.drawTable());
    this.part("save").addEventListener("click", () => this.save());
    this.map = new Heatmap(cells(data, this.planned, words), words, (index) => this.choose(index));
    this.map.mark(this.chosen);
    fill(this.part("map"), this.map.figure);
    this.draw();
  }

  /** A button of the choice of metrics. */
  private choice(metric: Metric): HTMLElement {
    const input = element("input", { type: "radio", name: "metric", value: metric });
    input.checked = metric === this.metric;
    input.addEventListener("change", () => {
      this.metric = metric;
      this.drawMetrics();
    });
    return element("label", {}, input, ` ${this.words.say(`metric.${metric}`)}`);
  }

  /** The metrics that a weight was decomposed in, and its spectra. */
  private spectraOf(weight: Weight): [Metric, Spectrum][] {
    const name = weight.names[0]!;
    return METRICS.flatMap((metric): [Metric, Spectrum][] => {
      const spectrum = this.data.spectra[metric]?.[name];
      return spectrum ? [[metric, spectrum]] : [];
    });
  }

  /** Plan at an amount, at most once a frame. */
  private ask(amount: number, number: HTMLInputElement): void {
    const [low, high] = this.planner.range;
    if (!Number.isFinite(amount)) amount = this.planned.amount;
    this.wanted = Math.min(Math.max(amount, low), high);
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.planned = this.planner.plan(this.wanted);
      number.value = String(round(this.shown(this.wanted)));
      this.draw();
    });
  }

  private choose(index: number): void {
    this.chosen = index;
    this.part<HTMLSelectElement>("choose").value = String(index);
    this.map?.mark(index);
    this.drawWeight();
  }

  /** Show the plan: sizes and ranks at once, the figures when the page has time for them. */
  private draw(): void {
    this.drawTiles();
    this.map?.show(cells(this.data, this.planned, this.words));
    this.root.dataset["amount"] = String(this.planned.amount);
    window.clearTimeout(this.later);
    this.later = window.setTimeout(() => {
      this.drawTable();
      this.drawCurve();
      this.drawWeight();
      this.part("recipe").textContent = this.recipe();
      this.root.dataset["drawn"] = String(this.planned.amount);
    }, PAUSE);
  }

  private drawTiles(): void {
    const { words, data, planned } = this;
    const before = { numbers: data.before.numbers + data.rest.numbers, bytes: data.before.bytes + data.rest.bytes };
    const dense = planned.positions.filter((position, i) => data.weights[i]!.ranks[position] === null).length;
    const level = this.factor * planned.multiplier * 1e6;
    const unit = words.say("lost.unit", { prediction: data.prediction });
    const tiles: [string, string, string][] = [
      [words.say("model.numbers"), words.millions(planned.numbers + data.rest.numbers), words.say("was", { before: words.millions(before.numbers) })],
      [words.say("model.bytes"), words.megabytes(planned.bytes + data.rest.bytes), words.say("was", { before: words.megabytes(before.bytes) })],
      data.nats
        ? [words.say("lost"), words.number(this.factor * planned.lost), unit]
        : [words.say("lost.share"), words.number(planned.lost), ""],
      [words.say("level"), words.number(level, 2), words.say(this.bytes ? "level.unit.bytes" : "level.unit")],
      [words.say("dense.count"), words.say("of", { some: dense, all: data.weights.length }), ""],
    ];
    fill(this.part("tiles"), ...tiles.map(([name, value, unit]) => element("div", {}, element("dt", {}, name), element("dd", {}, element("b", {}, value), ` ${unit}`))));
  }

  private drawTable(): void {
    if (!this.part<HTMLDetailsElement>("details").open) return;
    const { words, data, planned } = this;
    const head = ["table.weight", "rank", "table.share", "table.lost"] as const;
    const rows = data.weights.map((weight, i) => {
      const position = planned.positions[i]!;
      const said = [rankOf(weight, position, words), words.percent(shareOf(weight, position)), words.number(this.factor * weight.options.losses[position]!)];
      return element("tr", {}, element("th", { scope: "row" }, weight.names.join(", ")), ...said.map((text) => element("td", { class: "n" }, text)));
    });
    fill(this.part("table"), element("table", {}, element("thead", {}, element("tr", {}, ...head.map((key, i) => element("th", { scope: "col", class: i ? "n" : "" }, words.say(key))))), element("tbody", {}, ...rows)));
  }

  private drawCurve(): void {
    const { words, data, planned } = this;
    const here = this.point(planned);
    const others = data.integers.flatMap(({ bits, bytes, lost }): Labelled[] =>
      lost === null ? [] : [{ label: words.say("integers", { bits }), size: bytes / 1e6, lost: this.factor * lost }],
    );
    const place = this.part("curve");
    fill(place, curve(this.points, here, others, words, place.clientWidth));
    this.drawBeside(here);
  }

  private point({ bytes, lost }: Planned): Point {
    return { size: (bytes + this.data.rest.bytes) / 1e6, lost: this.factor * lost };
  }

  /** Show integers of the dense weights beside the plan, and say which is the better one. */
  private drawBeside(here: Point): void {
    const { words, data } = this;
    const row = (name: string, bytes: number, lost: number | null): HTMLElement =>
      element("tr", {}, element("th", { scope: "row" }, name), element("td", { class: "n" }, words.megabytes(bytes)), element("td", { class: "n" }, lost === null ? words.say("unknown") : words.number(lost)));
    const head = ["beside.what", "model.bytes", data.nats ? "lost" : "lost.share"] as const;
    const rows = data.integers.map(({ bits, bytes, lost }) => row(words.say("integers.dense", { bits }), bytes, lost === null ? null : this.factor * lost));
    fill(this.part("beside"), element("table", {}, element("thead", {}, element("tr", {}, ...head.map((key, i) => element("th", { scope: "col", class: i ? "n" : "" }, words.say(key))))), element("tbody", {}, row(words.say("beside.plan"), 1e6 * here.size, here.lost), ...rows)));
    const better = data.integers.filter(({ bytes, lost }) => lost !== null && bytes <= 1e6 * here.size && this.factor * lost <= here.lost);
    const known = data.integers.some(({ lost }) => lost !== null);
    const verdict = better[0] ? words.say("beside.integers", { bits: better[0].bits }) : words.say(known ? "beside.factors" : "beside.unknown");
    this.part("verdict").textContent = verdict;
  }

  /** Show the spectrum of the chosen weight in the metrics that it is known in. */
  private drawMetrics(): void {
    const { words, data } = this;
    const known = this.spectraOf(data.weights[this.chosen]!);
    const place = this.part("metrics");
    this.part("choices").hidden = known.length === 0;
    if (known.length === 0) {
      const some = data.weights.filter((weight) => this.spectraOf(weight).length > 0).map((weight) => weight.names[0]!);
      fill(place);
      this.part("metrics-words").textContent = some.length ? words.say("metrics.elsewhere", { names: some.join(", ") }) : words.say("metrics.none");
      return;
    }
    const [metric, spectrum] = known.find(([name]) => name === this.metric) ?? known[0]!;
    const named = known.map(([name, values]) => [words.say(`metric.${name}`), values] as const);
    fill(place, metrics(named, words.say(`metric.${metric}`), words, place.clientWidth));
    const values = { metric: words.say(`metric.${metric}`), most: spectrum.most, full: spectrum.full, share: words.percent(spectrum.most / spectrum.full, 0) };
    this.part("metrics-words").textContent = words.say("metrics.caption", values);
  }

  private drawWeight(): void {
    const { words, data, planned } = this;
    const weight = data.weights[this.chosen]!;
    const position = planned.positions[this.chosen]!;
    const [out, into] = weight.shape;
    const values = { name: weight.names.join(", "), out, in: into, rank: rankOf(weight, position, words), share: words.percent(shareOf(weight, position)) };
    const bits = weight.bits[position]!;
    const said = [words.say(weight.ranks[position] === null ? "state.dense" : "state.rank", values)];
    if (bits) said.push(words.say("state.bits", { bits }));
    if (weight.forced) said.push(words.say("state.forced"));
    this.part("state").textContent = said.join(" ");
    this.drawMetrics();
    const width = this.part("water").clientWidth;
    fill(this.part("water"), water(weight, position, planned.multiplier, this.factor, this.bytes, words, width));
    const alone = weight.names.length === 1; // weights that are cut together store something else than two factors
    fill(this.part("even"), alone ? storage(weight, position, words, width) : null);
    const even = { even: Math.floor((out * into) / (out + into)) };
    this.part("even-words").textContent = alone ? words.say("even.caption", even) : words.say("even.together");
  }

  /** Find what each size costs, a point at a time, so that the page stays quick. */
  private async trace(): Promise<void> {
    const [low, high] = this.planner.range;
    for (let i = 0; i < SIZES; i++) {
      await new Promise((resolve) => setTimeout(resolve));
      const amount = low + ((high - low) * (i + 1)) / (SIZES + 1);
      this.points.push(this.point(this.planner.plan(amount)));
    }
    this.drawCurve();
    this.root.dataset["traced"] = "yes";
  }

  /** The recipe of the plan: what the program takes to come to the same ranks. */
  private recipe(): string {
    const amount = this.planned.amount;
    const size = this.bytes ? `budget: ${((amount + this.data.rest.bytes) / 1e6).toFixed(6)}MB` : `keep: ${amount / this.data.before.numbers}`;
    return `${size}\n${this.data.recipe}\n`;
  }

  private save(): void {
    const url = URL.createObjectURL(new Blob([this.recipe()], { type: "application/yaml" }));
    element("a", { href: url, download: "recipe.yaml" }).click();
    URL.revokeObjectURL(url);
  }
}

function rankOf(weight: Weight, position: number, words: Words): string {
  const rank = weight.ranks[position];
  return rank === null || rank === undefined ? words.say("dense") : String(rank);
}

const round = (value: number): number => Math.round(10 * value) / 10;
const ceil = (value: number): number => Math.ceil(10 * value) / 10;
const floor = (value: number): number => Math.floor(10 * value) / 10;

async function start(): Promise<void> {
  const language: Language = document.documentElement.lang === "es" ? "es" : "en";
  startServed(language);
  const root = document.getElementById("explorer");
  const stored = document.getElementById("explorer-data");
  if (!root || !stored) return;
  try {
    new Explorer(root, await unpack(JSON.parse(stored.textContent ?? "") as Stored), language);
  } catch (error) {
    const why = error instanceof Error ? error.message : String(error);
    fill(root, element("p", { role: "alert" }, new Words(language).say("explore.failed", { why })));
  }
}

void start();
