import { expect, test } from "vitest";
import { mostChanged, thickness, visible, type Token } from "../src/served";

const tokens: Token[] = [
  { text: "<s>" },
  { text: "a", divergence: 0.1 },
  { text: "b", divergence: 0.4 },
  { text: "c", divergence: 0 },
];

test("white space of a token can be seen, and an empty one too", () => {
  expect(visible(" the\n\tend")).toBe("␣the↵⇥end");
  expect(visible("\r\n")).toBe("↵");
  expect(visible("")).toBe("∅");
  expect(visible("<b>&")).toBe("<b>&");
});

test("the tokens that changed most come first, without the one that was not predicted", () => {
  expect(mostChanged(tokens, 2)).toEqual([2, 1]);
  expect(mostChanged(tokens, 10)).toEqual([2, 1, 3]);
  expect(mostChanged([tokens[0]!], 10)).toEqual([]);
});

test("bars are as thick as the change, and none where nothing changed", () => {
  expect(thickness(tokens, 8)).toEqual([0, 2, 8, 0]);
  expect(thickness([{ text: "a", divergence: 0 }], 8)).toEqual([0]);
});
