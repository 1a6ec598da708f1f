import { expect, test } from "vitest";
import { likeliest, mostChanged, thickness, visible, type Token } from "../../src/served";

const tokens: Token[] = [
  { text: "<s>" },
  { text: "a", divergence: 0.1 },
  { text: "b", divergence: 0.4 },
  { text: "c", divergence: 0 },
];

test("white space of a token can be seen, and an empty one too", () => {
  expect(visible(" the\n\tend")).toBe("␣the↵⇥end");
  expect(visible("\r\n")).toBe("↵");
  expect(visible("\u0007\u200b\u202e")).toBe("U+0007U+200BU+202E");
  expect(visible("")).toBe("∅");
  expect(visible("<b>&")).toBe("<b>&");
});

test("the tokens that changed most come first, without the one that was not predicted", () => {
  expect(mostChanged(tokens, 2)).toEqual([2, 1]);
  expect(mostChanged(tokens, 10)).toEqual([2, 1, 3]);
  expect(mostChanged([tokens[0]!], 10)).toEqual([]);
});

test("each model has its own most likely token", () => {
  const candidates = [
    { text: " a", dense: 0.5, factored: 0.2 },
    { text: "b", dense: 0.3, factored: 0.6 },
  ];
  const reading = { tokens, mean: 0, same: 0, next: { divergence: 0, candidates } };
  expect([likeliest(reading, "dense"), likeliest(reading, "factored")]).toEqual(["␣a", "b"]);
});

test("bars are as thick as the change, and none where nothing changed", () => {
  expect(thickness(tokens, 8)).toEqual([0, 2, 8, 0]);
  expect(thickness([{ text: "a", divergence: 0 }], 8)).toEqual([0]);
});
