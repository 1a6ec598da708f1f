/** Headless Chromium, wherever it is. */

import { existsSync } from "node:fs";
import { delimiter, join } from "node:path";
import { chromium, type Browser } from "playwright-core";

const NAMES = ["chromium", "chromium-browser", "google-chrome"];

function found(): string {
  const places = (process.env["PATH"] ?? "").split(delimiter).flatMap((folder) => NAMES.map((name) => join(folder, name)));
  const path = process.env["CHROMIUM"] ?? places.find((place) => existsSync(place));
  if (!path) throw new Error("no Chromium was found: install it (apt-get install chromium), or name it with CHROMIUM");
  return path;
}

export function launch(): Promise<Browser> {
  const args = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"];
  return chromium.launch({ executablePath: found(), args });
}
