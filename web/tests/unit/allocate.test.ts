import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { unpack, type Stored } from "../../src/data";
import { Planner } from "../../src/planner";

interface Case {
  readonly name: string;
  readonly data: Stored;
  /** Amounts, and what the program chooses at each: a position for every weight. */
  readonly planned: readonly [amount: number, positions: readonly number[]][];
}

/** Written by the program, and held to it by tests/report/test_explorer.py. */
const cases = JSON.parse(readFileSync(new URL("../plans.json", import.meta.url), "utf8")) as Case[];

test.each(cases)("the page plans what the program plans: $name", async ({ data, planned }) => {
  const planner = new Planner(await unpack(data));
  expect(planned.length).toBeGreaterThanOrEqual(20);
  for (const [amount, positions] of planned) expect(planner.plan(amount).positions).toEqual(positions);
  for (const [amount, positions] of [...planned].reverse()) expect(planner.plan(amount).positions).toEqual(positions);
});

test.each(cases)("no plan exceeds its budget, and a larger one loses no more: $name", async ({ data }) => {
  const planner = new Planner(await unpack(data));
  const [low, high] = planner.range;
  let before = Infinity;
  for (let i = 0; i <= 40; i++) {
    const planned = planner.plan(low + ((high - low) * i) / 40);
    expect(planner.cost(planned)).toBeLessThanOrEqual(planned.amount);
    expect(planned.lost).toBeLessThanOrEqual(before * (1 + 1e-9));
    before = planned.lost;
  }
});

test("data of another version is refused", async () => {
  await expect(unpack({ ...cases[0]!.data, version: 99 })).rejects.toThrow("version 99");
});
