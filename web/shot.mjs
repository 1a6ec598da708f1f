import { chromium } from "playwright-core";
const browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: ["--no-sandbox","--disable-gpu","--disable-quic","--no-first-run","--disable-background-networking","--disable-component-update","--disable-sync"] });
for (const [name, opt] of Object.entries({ wide: { viewport: { width: 1280, height: 900 } }, phone: { viewport: { width: 360, height: 780 } }, dark: { viewport: { width: 1280, height: 900 }, colorScheme: "dark" } })) {
  const page = await browser.newPage(opt);
  page.on("console", m => console.log(m.text())); page.on("pageerror", e => console.log("ERR", e.message)); page.on("request", r => { if (!r.url().startsWith("file")) console.log("REQ", r.url().slice(0,80)); });
  const t = Date.now();
  await page.goto("file:///tmp/page.html");
  await page.waitForSelector("#explorer[data-amount]");
  console.log(name, "first", Date.now() - t);
  await page.waitForSelector("#explorer[data-traced]"); console.log("traced", Date.now() - t);
  const ms = await page.evaluate(async () => { const s = document.querySelector("[data-part=slider]"); const out = [];
    for (const v of [60, 120, 180, 90, 150]) { const t = performance.now(); s.value = v; s.dispatchEvent(new Event("input")); await new Promise(r => { const o = new MutationObserver(() => { o.disconnect(); r(); }); o.observe(document.getElementById('explorer'), { attributes: true, attributeFilter: ['data-amount'] }); }); out.push(performance.now() - t); } return out; });
  console.log("slider", ms.map(x => x.toFixed(0)).join(" "));
  console.log("overflow", await page.evaluate(() => document.documentElement.scrollWidth), opt.viewport.width);
  await (await page.$("#explorer")).screenshot({ path: `/tmp/${name}.png` });
}
await browser.close();
