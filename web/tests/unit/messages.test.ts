import { expect, test } from "vitest";
import table from "../../../src/twofold/report/messages.json";
import { Words, type Key } from "../../src/messages";

const keys = Object.keys(table) as Key[];
const holes = (text: string): string[] => [...text.matchAll(/\{(\w+)\}/g)].map((match) => match[1]!).sort();

test.each(keys)("%s is said in both languages, with the same values", (key) => {
  const { en, es } = table[key];
  expect(en.trim()).not.toBe("");
  expect(es.trim()).not.toBe("");
  expect(holes(es)).toEqual(holes(en));
});

test("values are put in, and numbers are written as the language has them", () => {
  expect(new Words("en").say("of", { some: 1, all: 2 })).toBe("1 of 2");
  expect(new Words("es").percent(0.125)).toMatch(/^12,5\s%$/);
  expect(new Words("en").megabytes(1_234_567)).toBe("1.2 MB");
});
