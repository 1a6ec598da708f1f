/** The figures of the page, drawn by Observable Plot in its colours, light or dark. */

import * as Plot from "@observablehq/plot";
import type { Data, Spectrum, Weight } from "./data";
import type { Words } from "./messages";
import type { Planned } from "./planner";

const AFTER = "var(--after)";
const BEFORE = "var(--before)";
const WIDEST = 640; // pixels, of a figure that has the page's width to itself

const across = (room: number): number => Math.max(260, Math.min(room, WIDEST));

export type Figure = (SVGSVGElement | HTMLElement) & Plot.Plot;

/** Draw a figure that is one image with a name: what its marks are called would be read one after another. */
function drawn(options: Plot.PlotOptions & { readonly ariaLabel: string }): Figure {
  const figure = Plot.plot(options) as Figure;
  figure.querySelectorAll("g[aria-label]").forEach((mark) => mark.removeAttribute("aria-label"));
  const images = figure instanceof SVGSVGElement ? [figure] : figure.querySelectorAll("svg");
  images.forEach((image) => (image.getAttribute("aria-label") ? image.setAttribute("role", "img") : image.setAttribute("aria-hidden", "true")));
  return figure;
}

export interface Cell {
  readonly index: number;
  readonly row: string;
  readonly column: string;
  readonly rank: string;
  readonly share: number;
}

/** What each weight keeps in a plan, as cells of a map of kinds and layers. */
export function cells(data: Data, planned: Planned, words: Words): Cell[] {
  const stacks = new Set(data.weights.map((weight) => weight.stack)).size > 1;
  return data.weights.map((weight, index) => {
    const position = planned.positions[index]!;
    const rank = weight.ranks[position];
    const layer = weight.layer === null ? words.say("outside") : String(weight.layer);
    return {
      index,
      row: weight.kind,
      column: stacks && weight.stack ? `${weight.stack} ${layer}` : layer,
      rank: rank === null || rank === undefined ? "=" : String(rank),
      share: shareOf(weight, position),
    };
  });
}

/** The share of a weight that a choice stores. */
export function shareOf(weight: Weight, position: number): number {
  const before = weight.shape[0] * weight.shape[1] * weight.names.length;
  return weight.dense ? weight.numbers[position]! / weight.dense.numbers : weight.numbers[position]! / before;
}

/** The ranks of all weights, as a map of kinds and layers. A new plan changes its cells in place. */
export class Heatmap {
  readonly figure: Figure;
  private readonly rects: SVGRectElement[];
  private readonly texts: SVGTextElement[];

  constructor(found: readonly Cell[], words: Words, choose: (index: number) => void) {
    const columns = [...new Set(found.map((cell) => cell.column))];
    const rows = [...new Set(found.map((cell) => cell.row))];
    const side = Math.max(26, Math.min(44, 900 / columns.length));
    const label = 7 * Math.max(...rows.map((row) => row.length)) + 14;
    this.figure = drawn({
      width: columns.length * side + label + 20,
      height: rows.length * 30 + 56,
      marginLeft: label,
      marginTop: 8,
      marginBottom: 46,
      padding: 0.06,
      ariaLabel: words.say("map"),
      x: { type: "band", domain: columns, label: words.say("layer"), tickSize: 0 },
      y: { type: "band", domain: rows, label: null, tickSize: 0 },
      marks: [
        Plot.cell(found, { x: "column", y: "row", fill: () => "var(--low)", inset: 0.5, className: "cells" }),
        Plot.text(found, { x: "column", y: "row", text: "rank", fontSize: 11, className: "ranks" }),
      ],
    });
    this.rects = [...this.figure.querySelectorAll<SVGRectElement>("g.cells rect")];
    this.texts = [...this.figure.querySelectorAll<SVGTextElement>("g.ranks text")];
    this.rects.forEach((rect, i) => rect.addEventListener("click", () => choose(i)));
    this.texts.forEach((text) => text.setAttribute("pointer-events", "none"));
    this.show(found);
  }

  /** Show what each weight keeps; the cells are those of before. */
  show(found: readonly Cell[]): void {
    found.forEach(({ rank, share }, i) => {
      this.rects[i]!.style.fill = shade(share);
      this.texts[i]!.textContent = rank;
      this.texts[i]!.setAttribute("class", share > 0.75 ? "strong" : share > 0.5 ? "medium" : "weak");
    });
  }

  /** Mark a weight as the chosen one. */
  mark(chosen: number): void {
    this.rects.forEach((rect, i) => rect.classList.toggle("chosen", i === chosen));
  }
}

function shade(share: number): string {
  return `color-mix(in srgb, var(--high) ${(100 * Math.min(share, 1)).toFixed(1)}%, var(--low))`;
}

export interface Point {
  /** MB of the whole model. */
  readonly size: number;
  readonly lost: number;
}

export interface Labelled extends Point {
  readonly label: string;
}

/** What each size loses, the plan of the moment, and other ways to the same bytes. */
export function curve(points: readonly Point[], here: Point, others: readonly Labelled[], words: Words, room: number): Figure {
  return drawn({
    width: across(room),
    height: 260,
    marginLeft: 64,
    marginBottom: 40,
    marginTop: 28,
    grid: true,
    ariaLabel: words.say("curve"),
    x: { label: words.say("curve.x"), tickFormat: (value: number) => words.number(value), zero: true },
    y: { label: words.say("lost"), type: "log", tickFormat: (value: number) => words.number(value, 2), ticks: 6 },
    marks: [
      Plot.line(points.filter((point) => point.lost > 0), { x: "size", y: "lost", stroke: AFTER, strokeWidth: 2 }),
      Plot.dot(others, { x: "size", y: "lost", symbol: "square", r: 5, stroke: "currentColor", strokeWidth: 2 }),
      Plot.text(others, { x: "size", y: "lost", text: "label", dy: -13, fill: "currentColor" }),
      Plot.dot(here.lost > 0 ? [here] : [], { x: "size", y: "lost", fill: AFTER, r: 6, stroke: "var(--paper)", strokeWidth: 2 }),
    ],
  });
}

/** One weight's spectrum in some metrics; the one that is looked at is drawn strongly. */
export function metrics(spectra: readonly (readonly [name: string, spectrum: Spectrum])[], chosen: string, words: Words, room: number): Figure {
  const values = spectra.flatMap(([name, { places, shares, full }]) =>
    places.map((place, i) => ({ name, place: (100 * place) / full, share: 100 * shares[i]! })).filter(({ share }) => share > 0),
  );
  const top = Math.max(...values.map(({ share }) => share));
  return drawn({
    width: across(room),
    height: 260,
    marginLeft: 64,
    marginBottom: 40,
    grid: true,
    ariaLabel: words.say("metrics"),
    x: { label: words.say("metrics.x"), domain: [0, 100] },
    y: { label: words.say("metrics.y"), type: "log", domain: [top * 1e-7, top * 1.5], ticks: 6, tickFormat: (value: number) => words.number(value, 2) },
    marks: [
      Plot.line(values, {
        x: "place", y: "share", z: "name", clip: true,
        stroke: ({ name }: { name: string }) => (name === chosen ? AFTER : BEFORE),
        strokeWidth: ({ name }: { name: string }) => (name === chosen ? 3 : 1.2),
      }),
      Plot.text(values, Plot.selectLast({
        x: "place", y: "share", z: "name", text: "name", textAnchor: "end", dx: -4, dy: -8, fill: "currentColor", stroke: "var(--paper)",
        filter: ({ share }: { share: number }) => share > top * 1e-7,
      })),
    ],
  }); // prettier-ignore
}

interface Step {
  readonly rank: number;
  readonly rate: number;
  readonly kept: boolean;
}

/** What each step up from rank to rank saves for what it stores, and whether a plan takes it. */
function steps(weight: Weight, position: number): Step[] {
  const { costs, losses, first } = weight.options;
  const found: Step[] = [];
  for (let i = first + 1; i < costs.length; i++) {
    const rate = (losses[i - 1]! - losses[i]!) / (costs[i]! - costs[i - 1]!);
    if (rate > 0 && Number.isFinite(rate)) found.push({ rank: weight.ranks[i]!, rate, kept: position < first || i <= position });
  }
  return found;
}

export function water(weight: Weight, position: number, level: number, factor: number, bytes: boolean, words: Words, room: number): Figure {
  const all = steps(weight, position).map((step) => ({ ...step, rate: step.rate * factor }));
  const top = Math.max(...all.map((step) => step.rate), level * factor);
  const bottom = Math.max(Math.min(...all.map((step) => step.rate)), top * 1e-9);
  const every = Math.max(1, Math.floor(all.length / 300));
  const shown = all.filter((step, i) => i % every === 0 && step.rate >= bottom);
  const kept = (step: Step): string => words.say(step.kept ? "kept" : "cut");
  return drawn({
    width: across(room),
    height: 260,
    marginLeft: 64,
    marginBottom: 40,
    grid: true,
    ariaLabel: words.say("water"),
    x: { label: words.say("water.x") },
    y: { label: words.say(bytes ? "water.y.bytes" : "water.y"), type: "log", domain: [bottom, top * 1.5], ticks: 6, tickFormat: ".0e" },
    color: { domain: [words.say("kept"), words.say("cut")], range: [AFTER, BEFORE], legend: true },
    symbol: { domain: [words.say("kept"), words.say("cut")], range: ["circle", "times"] },
    marks: [
      Plot.dot(shown, { x: "rank", y: "rate", stroke: kept, symbol: kept, r: 2 }),
      level > 0 ? Plot.ruleY([level * factor], { stroke: "currentColor", strokeDasharray: "5 4" }) : null,
      level > 0
        ? Plot.text([level * factor], { y: (value: number) => value, text: () => "λ", frameAnchor: "right", dy: -8, fill: "currentColor" })
        : null,
    ],
  });
}

export function storage(weight: Weight, position: number, words: Words, room: number): Figure {
  const [m, n] = weight.shape;
  const full = Math.min(m, n);
  const ranks = Array.from({ length: 61 }, (_, i) => Math.round((full * i) / 60));
  const lines = [
    ...ranks.map((rank) => ({ rank, share: (100 * rank * (m + n)) / (m * n), form: words.say("plain") })),
    ...ranks.map((rank) => ({ rank, share: (100 * rank * (m + n - rank)) / (m * n), form: words.say("gauge") })),
  ];
  const rank = weight.ranks[position];
  return drawn({
    width: across(room),
    height: 260,
    marginLeft: 64,
    marginBottom: 40,
    grid: true,
    ariaLabel: words.say("even"),
    x: { label: words.say("rank") },
    y: { label: words.say("even.y"), domain: [0, 200] },
    color: { domain: [words.say("plain"), words.say("gauge")], range: ["currentColor", AFTER], legend: true },
    marks: [
      Plot.line(lines, { x: "rank", y: "share", stroke: "form", strokeWidth: 2, clip: true }),
      Plot.ruleY([100], { stroke: "currentColor", strokeDasharray: "5 4" }),
      Plot.text([100], { y: (value: number) => value, text: () => words.say("dense"), frameAnchor: "right", dy: -8, fill: "currentColor" }),
      Plot.dot(rank === null || rank === undefined ? [] : [rank], {
        x: (value: number) => value,
        y: () => 100 * shareOf(weight, position),
        fill: AFTER,
        r: 6,
        stroke: "var(--paper)",
        strokeWidth: 2,
      }),
    ],
  });
}
