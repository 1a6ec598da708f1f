/** A plan at a budget, from the data of the page. */

import { Allocator, cost, least } from "./allocate";
import type { Data, Weight } from "./data";

export interface Planned {
  /** What may be spent on all weights, in the unit of the data. */
  readonly amount: number;
  /** For each weight the position of its choice. */
  readonly positions: readonly number[];
  /** What one more unit of cost saves in each weight; 0 where everything fits. */
  readonly multiplier: number;
  /** Σσ² left out. */
  readonly lost: number;
  /** What the factorized weights store. */
  readonly numbers: number;
  readonly bytes: number;
}

export class Planner {
  private readonly free: readonly number[];
  private readonly fixed: readonly (number | null)[];
  private readonly decided: number;
  private readonly allocator: Allocator;
  /** The least and the most that can be spent. */
  readonly range: readonly [number, number];

  constructor(readonly data: Data) {
    this.fixed = data.weights.map(({ forced, options }) =>
      forced === null ? null : forced.index === null ? 0 : forced.index + options.first,
    );
    this.free = data.weights.flatMap((_, i) => (this.fixed[i] === null ? [i] : []));
    this.decided = data.weights.reduce((sum, weight, i) => {
      const position = this.fixed[i];
      return position === null || position === undefined ? sum : sum + weight.options.costs[position]!;
    }, 0);
    const options = this.free.map((i) => data.weights[i]!.options);
    this.allocator = new Allocator(options);
    this.range = [this.decided + least(options), data.before[data.unit]];
  }

  /** Plan at an amount, as `twofold plan` does. */
  plan(amount: number): Planned {
    const { positions: chosen, multiplier } = this.allocator.allocate(amount - this.decided);
    const positions = this.fixed.map((position) => position ?? 0);
    this.free.forEach((i, k) => (positions[i] = chosen[k]!));
    const sum = (of: (weight: Weight, position: number) => number): number =>
      this.data.weights.reduce((total, weight, i) => total + of(weight, positions[i]!), 0);
    return {
      amount,
      positions,
      multiplier,
      lost: sum((weight, position) => weight.options.losses[position]!),
      numbers: sum((weight, position) => weight.numbers[position]!),
      bytes: sum((weight, position) => weight.bytes[position]!),
    };
  }

  /** What a plan costs in the unit of the budget. */
  cost(planned: Planned): number {
    return cost(this.data.weights.map((weight) => weight.options), planned.positions);
  }
}
