/** What the page is given to plan from: src/twofold/report/explorer.py writes it. */

import type { Options } from "./allocate";

export const VERSION = 1;

interface Size {
  readonly numbers: number;
  readonly bytes: number;
}

interface StoredWeight {
  readonly names: readonly string[];
  readonly kind: string;
  readonly stack: string | null;
  readonly layer: number | null;
  readonly shape: readonly [outputs: number, inputs: number];
  readonly full: number;
  readonly total: number | null;
  readonly dense: (Size & { readonly cost: number }) | null;
  readonly choices: number;
  readonly forced: { readonly index: number | null } | null;
}

/** A spectrum as shares of its sum, at some places (1 is the largest value). */
export interface Spectrum {
  readonly places: readonly number[];
  readonly shares: readonly number[];
  /** The rank that holds 99 % of the sum. */
  readonly most: number;
  readonly full: number;
}

export type Metric = "plain" | "inputs" | "both";

/** The model with its dense weights in integers; what that loses, Σσ², if it is known. */
export interface Integers {
  readonly bits: number;
  readonly bytes: number;
  readonly lost: number | null;
}

export interface Stored {
  readonly version: number;
  readonly model: string;
  readonly prediction: string;
  readonly nats: boolean;
  readonly unit: "numbers" | "bytes";
  readonly thin: number;
  readonly rest: Size;
  readonly before: Size;
  readonly amount: number;
  readonly recipe: string;
  readonly weights: readonly StoredWeight[];
  readonly numbers: string;
  readonly spectra: Readonly<Partial<Record<Metric, Readonly<Record<string, Spectrum>>>>>;
  readonly integers: readonly Integers[];
}

/** A weight with its choices; those of `options` begin with dense where that is allowed. */
export interface Weight extends StoredWeight {
  readonly options: Options;
  /** Of each option: the rank, or null for dense. */
  readonly ranks: readonly (number | null)[];
  /** Of each option: the bits of its integers, or 0 for floating point. */
  readonly bits: Float64Array;
  readonly numbers: Float64Array;
  readonly bytes: Float64Array;
}

export type Data = Omit<Stored, "weights" | "numbers"> & { readonly weights: readonly Weight[] };

/** Unpack what the page was given. */
export async function unpack(stored: Stored): Promise<Data> {
  if (stored.version !== VERSION) throw new RangeError(`data of version ${stored.version}, and this page reads ${VERSION}`);
  const block = await inflate(stored.numbers);
  let at = 0;
  const take = (length: number): Float64Array => block.subarray(at, (at += length));
  const whole = (length: number): Float64Array => summedTwice(take(length));
  const weights = stored.weights.map((weight): Weight => {
    const [ranks, bits, costs, numbers, bytes] = Array.from({ length: 5 }, () => whole(weight.choices)) as Columns;
    const losses = take(weight.choices);
    const { dense } = weight;
    const led = (first: number | undefined, rest: Float64Array): Float64Array =>
      first === undefined ? rest : Float64Array.of(first, ...rest);
    return {
      ...weight,
      options: {
        costs: led(dense?.cost, costs),
        losses: led(dense ? 0 : undefined, losses),
        first: dense ? 1 : 0,
        full: weight.full,
      },
      ranks: [...(dense ? [null] : []), ...ranks],
      bits: led(dense ? 0 : undefined, bits),
      numbers: led(dense?.numbers, numbers),
      bytes: led(dense?.bytes, bytes),
    };
  });
  return { ...stored, weights };
}

type Columns = [Float64Array, Float64Array, Float64Array, Float64Array, Float64Array];

async function inflate(text: string): Promise<Float64Array> {
  const signs = atob(text);
  const packed = new Uint8Array(signs.length);
  for (let i = 0; i < packed.length; i++) packed[i] = signs.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Float64Array(await new Response(stream).arrayBuffer()); // little-endian, as every machine of today
}

function summedTwice(differences: Float64Array): Float64Array {
  const out = new Float64Array(differences.length);
  let [slope, value] = [0, 0];
  for (let i = 0; i < out.length; i++) {
    slope += differences[i]!;
    value += slope;
    out[i] = value;
  }
  return out;
}
