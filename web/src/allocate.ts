/**
 * The allocation `global`, as src/twofold/allocate/global_.py has it, so that the page plans what the program plans.
 *
 * Every sum is taken in the same order and every tie is broken alike: a test holds both to the same ranks.
 */

/** What the choices for one weight cost and lose; dense is first, if it is allowed: it wins a tie with full rank. */
export interface Options {
  readonly costs: Float64Array;
  readonly losses: Float64Array;
  /** The position of the first rank: 1 behind dense, else 0. */
  readonly first: 0 | 1;
  /** The cost of the whole weight, in the unit of the costs. */
  readonly full: number;
}

export interface Allocated {
  /** For each weight a position among its options. */
  readonly positions: number[];
  /** The multiplier λ: what a unit of cost is worth, in the unit of the losses; 0 where everything fits. */
  readonly multiplier: number;
}

const BISECTIONS = 100;
const SHARE_BISECTIONS = 50;

/** The problem of one model, for many budgets. */
export class Allocator {
  /** The best positions at λ = 0 and at 10⁻³⁰, 10⁻²⁹ and so on, which serve all budgets. */
  private readonly decades: Found[] = [];

  constructor(private readonly options: readonly Options[]) {}

  /** Minimize Σ loss subject to Σ cost ≤ budget. */
  allocate(budget: number): Allocated {
    const { options } = this;
    let high = this.decade(0);
    if (high.cost > budget) {
      let low = high;
      for (let i = 1; high.cost > budget && high.multiplier < 1e30; i++) [low, high] = [high, this.decade(i)];
      low = { ...low, multiplier: 0 }; // the program halves until it is below, so that the same multipliers are tried
      for (let i = 0; i < BISECTIONS; i++) {
        const middle = this.at(low.multiplier > 0 ? Math.sqrt(low.multiplier * high.multiplier) : high.multiplier / 2, low, high);
        if (middle.cost > budget) low = middle;
        else high = middle;
        if (low.multiplier > 0 && high.multiplier / low.multiplier < 1 + 1e-12) break;
      }
    }
    // With few weights the jumps weigh more than the convex part; then the uniform ranks can be the better start.
    const [own, even] = [high.positions, uniform(options, budget)].map((start) =>
      spend(options, start, budget - cost(options, start)),
    ) as [number[], number[]];
    return { positions: loss(options, even) < loss(options, own) ? even : own, multiplier: high.multiplier };
  }

  /** The best positions at a multiplier; they lie between those of a lower and of a higher one. */
  private at(multiplier: number, low?: Found, high?: Found): Found {
    const positions = this.options.map((option, i) => best(option, multiplier, low?.positions[i], high?.positions[i]));
    return { multiplier, positions, cost: cost(this.options, positions) };
  }

  private decade(index: number): Found {
    const known = this.decades[index];
    if (known) return known;
    let multiplier = index === 0 ? 0 : 1e-30;
    for (let i = 1; i < index; i++) multiplier *= 10;
    return (this.decades[index] = this.at(multiplier, index > 0 ? this.decades[index - 1] : undefined));
  }
}

interface Found {
  readonly multiplier: number;
  readonly positions: number[];
  readonly cost: number;
}

/** What positions cost together. */
export function cost(options: readonly Options[], positions: readonly number[]): number {
  let total = 0;
  for (let i = 0; i < options.length; i++) total += options[i]!.costs[positions[i]!]!;
  return total;
}

/** What positions lose together. */
export function loss(options: readonly Options[], positions: readonly number[]): number {
  let total = 0;
  for (let i = 0; i < options.length; i++) total += options[i]!.losses[positions[i]!]!;
  return total;
}

/** The least that can be stored. */
export function least(options: readonly Options[]): number {
  let total = 0;
  for (const option of options) total += option.costs[cheapest(option)]!;
  return total;
}

/** The best position at a multiplier, from `least`, that of a higher one, to `most`, that of a lower one. */
function best({ costs, losses, first }: Options, multiplier: number, most?: number, least?: number): number {
  if (most !== undefined && most === least) return most;
  const open = most === undefined || most < first; // dense costs most
  let [place, lowest] = open && first === 1 ? [0, losses[0]! + multiplier * costs[0]!] : [-1, Infinity];
  const end = open ? costs.length - 1 : most;
  for (let i = Math.max(least ?? first, first); i <= end; i++) {
    const value = losses[i]! + multiplier * costs[i]!;
    if (value < lowest) [place, lowest] = [i, value];
  }
  return place;
}

function cheapest({ costs, first }: Options): number {
  let smallest: number = first;
  for (let i = first + 1; i < costs.length; i++) if (costs[i]! < costs[smallest]!) smallest = i;
  return first === 1 && (costs.length === 1 || costs[0]! <= costs[smallest]!) ? 0 : smallest;
}

/** One share for all weights, the largest that the budget allows. */
function uniform(options: readonly Options[], budget: number): number[] {
  let whole = 0;
  for (const option of options) whole += option.full;
  const most = budget / whole;
  const at = (share: number): number[] => options.map((option) => within(option, share * most));
  const all = at(1);
  if (cost(options, all) <= budget) return all;
  let [low, high] = [0, 1];
  for (let i = 0; i < SHARE_BISECTIONS; i++) {
    const middle = (low + high) / 2;
    if (cost(options, at(middle)) > budget) high = middle;
    else low = middle;
  }
  return at(low);
}

/** The largest rank that stores at most a share of the weight. */
function within(option: Options, share: number): number {
  const { costs, first, full } = option;
  const allowed = share * full * (1 + 1e-9);
  let [low, high] = [first as number, costs.length]; // the first rank that costs more: the costs ascend
  while (low < high) {
    const middle = (low + high) >> 1;
    if (costs[middle]! <= allowed) low = middle + 1;
    else high = middle;
  }
  const index = low - 1;
  if (first === 1 && costs[0]! <= allowed && (index < first || costs[index]! < costs[0]!)) return 0;
  return index >= first ? index : cheapest(option);
}

type Step = readonly [negativeRate: number, weight: number, position: number];

/** Spend what is left of the budget, the best step first. */
function spend(options: readonly Options[], start: readonly number[], room: number): number[] {
  const positions = [...start];
  const queue: Step[] = [];
  const offer = (i: number): void => {
    const step = nextStep(options[i]!, positions[i]!, room);
    if (step !== null) push(queue, [step[0], i, step[1]]);
  };
  for (let i = 0; i < options.length; i++) offer(i);
  while (queue.length > 0) {
    const [, i, position] = pop(queue);
    const { costs } = options[i]!;
    const extra = costs[position]! - costs[positions[i]!]!;
    if (extra <= 0) continue;
    if (extra <= room) {
      room -= extra;
      positions[i] = position;
    }
    offer(i);
  }
  return positions;
}

/** The affordable step up from a position that saves most loss for its cost. */
function nextStep({ costs, losses }: Options, position: number, room: number): [number, number] | null {
  let [rate, step] = [-1, -1];
  for (let i = 0; i < costs.length; i++) {
    const extra = costs[i]! - costs[position]!;
    const saved = losses[position]! - losses[i]!;
    if (extra > 0 && extra <= room && saved > 0 && saved / extra > rate) [rate, step] = [saved / extra, i];
  }
  return step < 0 ? null : [-rate, step];
}

function before(a: Step, b: Step): boolean {
  for (let k = 0; k < 3; k++) if (a[k] !== b[k]) return a[k]! < b[k]!;
  return false;
}

function push(heap: Step[], step: Step): void {
  let at = heap.push(step) - 1;
  while (at > 0) {
    const parent = (at - 1) >> 1;
    if (!before(step, heap[parent]!)) break;
    heap[at] = heap[parent]!;
    at = parent;
  }
  heap[at] = step;
}

function pop(heap: Step[]): Step {
  const top = heap[0]!;
  const last = heap.pop()!;
  if (heap.length > 0) {
    let at = 0;
    for (;;) {
      let child = 2 * at + 1;
      if (child >= heap.length) break;
      if (child + 1 < heap.length && before(heap[child + 1]!, heap[child]!)) child += 1;
      if (!before(heap[child]!, last)) break;
      heap[at] = heap[child]!;
      at = child;
    }
    heap[at] = last;
  }
  return top;
}
