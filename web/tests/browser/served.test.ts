/** The part of the page that asks models, in headless Chromium, with answers that are given here in the place of a server's. */

import { readFileSync } from "node:fs";
import AxeBuilder from "@axe-core/playwright";
import type { Browser, BrowserContextOptions, Page } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";
import { launch } from "./chromium";

const ATTACK = "<img src=x onerror=alert(1)>";
const AT = "http://127.0.0.1:8321/";
const read = (name: string): string => readFileSync(new URL(`../../../src/twofold/report/${name}`, import.meta.url), "utf8");
const server = {
  page: "keep-0.8", original: `tiny ${ATTACK}`, task: "causal-lm", asks: true, chat: true, answer: 40,
  sizes: [{ name: "keep-0.8", keep: 0.8, bytes: 3e8 }, { name: "a-long-name-of-a-size-without-any-space-0.4", keep: 0.4, bytes: 2e8 }],
}; // prettier-ignore
const expected: [string, string] = ["a", `</td>${ATTACK}`];
const reading = {
  tokens: [{ text: "The" }, ...[0.1, 0.7, 0].map((divergence) => ({ text: ` ${ATTACK}`, divergence, dense: 0.25, factored: 0.125, best: expected }))],
  mean: 0.8 / 3,
  same: 2,
  next: { divergence: 0.5, candidates: [{ text: " Paris", dense: 0.6, factored: 0.2 }, { text: ATTACK, dense: 0.1, factored: 0.4 }] },
}; // prettier-ignore

let browser: Browser;
beforeAll(async () => {
  browser = await launch();
});
afterAll(() => browser.close());

interface Opened {
  readonly page: Page;
  readonly faults: string[];
  readonly asked: { path: string; token: string | null; body: unknown }[];
}

async function open(language: string, options: BrowserContextOptions = {}, told: object = server): Promise<Opened> {
  const page = await (await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options })).newPage();
  const [faults, asked]: [string[], Opened["asked"]] = [[], []];
  page.on("pageerror", (error) => faults.push(error.message));
  page.on("dialog", (dialog) => (faults.push(dialog.message()), void dialog.dismiss()));
  const policy = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";
  const html = `<!doctype html><html lang="${language}"><head><meta charset="utf-8"><title>t</title><meta http-equiv="Content-Security-Policy" content="${policy}">
    <style>${read("report.css")}${read("web/explorer.css")}</style></head><body><main><h1>t</h1><section id="models"></section>
    <script type="application/json" id="explorer-server">${JSON.stringify(told).replaceAll("<", "\\u003c")}</script></main><script>${read("web/explorer.js")}</script></body></html>`;
  await page.route("**/*", async (route) => {
    const request = route.request();
    const url = new URL(request.url());
    if (request.method() === "GET") return route.fulfill({ contentType: "text/html", body: html });
    const body = request.postDataJSON() as { text: string };
    asked.push({ path: url.pathname, token: url.searchParams.get("token"), body });
    if (body.text === "gone") return route.abort();
    if (body.text.length > 100) return route.fulfill({ status: 400, json: { error: { message: "m", key: "served.long", values: { tokens: 600, most: 512 } } } });
    return route.fulfill({ json: url.pathname === "/read" ? reading : { dense: `Yes ${ATTACK}`, factored: " " } });
  });
  await page.goto(`${AT}?token=a%2Fb`);
  return { page, faults, asked };
}

test.each([
  ["en", {}],
  ["es", { viewport: { width: 360, height: 780 } }],
  ["en", { colorScheme: "dark" }],
] as [string, BrowserContextOptions][])("a text is asked by keyboard, answered and read without a finding of axe: %s %o", async (language, options) => {
  const { page, faults, asked } = await open(language, options);
  await page.focus("#models-text");
  await page.keyboard.press("Control+A");
  await page.keyboard.type("The capital");
  await page.keyboard.press("Tab");
  await page.keyboard.press("Tab");
  await page.keyboard.press("Space");
  await page.keyboard.press("Tab");
  await page.keyboard.press("Enter");
  await page.waitForSelector("#models .answers");
  const body = { size: "keep-0.8", text: "The capital", chat: true };
  expect(asked).toEqual(["/read", "/answer"].map((path) => ({ path, token: "a/b", body })));
  expect(await page.textContent("[role=status]")).toMatch(/␣Paris .* <img␣src=x␣onerror=alert\(1\)>/);
  expect(await page.locator("#models img").count()).toBe(0);
  expect(await page.locator(".most tbody tr").first().textContent()).toContain(language === "es" ? "30,7" : "30.7");
  expect(await page.locator(".token small").allTextContents()).toEqual(["–", "100", "700", "0"]);
  expect(await page.evaluate(() => document.documentElement.scrollWidth)).toBeLessThanOrEqual(options.viewport?.width ?? 1280);
  const { violations } = await new AxeBuilder({ page }).analyze();
  expect(violations.filter(({ impact }) => impact === "serious" || impact === "critical").map(({ id }) => id)).toEqual([]);
  expect(faults).toEqual([]);
  await page.context().close();
});

test("what can't be asked is said in the language of the page, and the page goes on", async () => {
  const { page, faults } = await open("es");
  const ask = async (text: string, words: string): Promise<void> => {
    await page.fill("#models-text", text);
    await page.click("#models button");
    await expect.poll(() => page.textContent("[role=status]")).toContain(words);
    expect(await page.locator("#models .answers").count()).toBe(0);
  };
  await ask("x".repeat(101), "600 tokens y se pueden comparar 512");
  await ask("gone", "El servidor ya no responde");
  await page.fill("#models-text", "again");
  await page.click("#models button");
  await page.waitForSelector("#models .answers");
  expect(faults).toEqual([]);
  await page.context().close();
});

test("another size has its report a link away, and what was answered is said in another language", async () => {
  const { page } = await open("en");
  expect(await page.isVisible("[data-part=report]")).toBe(false);
  await page.selectOption("#models-size", { index: 1 });
  expect(await page.getAttribute("[data-part=report]", "href")).toBe("?token=a%2Fb&size=a-long-name-of-a-size-without-any-space-0.4");
  await page.click("#models button");
  await page.waitForSelector("#models .answers");
  await page.evaluate(() => document.dispatchEvent(new CustomEvent("language", { detail: "es" })));
  expect(await page.textContent("#models")).toContain("Qué tokens cambiaron más");
  expect(await page.inputValue("#models-size")).toBe(server.sizes[1]!.name);
  await page.context().close();
});

test("a run that is no language model says so", async () => {
  const { page, faults } = await open("en", {}, { ...server, asks: false, task: "speech" });
  expect(await page.textContent("#models")).toContain("speech");
  expect(await page.locator("#models form").count()).toBe(0);
  expect(faults).toEqual([]);
  await page.context().close();
});
