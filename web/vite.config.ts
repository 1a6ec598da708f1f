import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";
import { defineConfig, type Plugin } from "vite";

const OUT = "../src/twofold/report/web";

/** Write the hash of what the page is built of, and of what was built: tests/report/test_explorer.py holds them together. */
function marked(): Plugin {
  const hash = (paths: string[]): string => paths.reduce((sum, path) => sum.update(readFileSync(path)), createHash("sha256")).digest("hex");
  return {
    name: "marked",
    closeBundle() {
      const sources = readdirSync("src", { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile());
      const paths = [...sources.map((entry) => join(entry.parentPath, entry.name)), "package-lock.json", "vite.config.ts", "../src/twofold/report/messages.json"];
      paths.sort((a, b) => (basename(a) < basename(b) ? -1 : 1));
      writeFileSync(join(OUT, "sources.sha256"), `${hash(paths)}\n${hash([join(OUT, "explorer.css"), join(OUT, "explorer.js")])}\n`);
    },
  };
}

/** One script and one style, which the program puts into its page. */
export default defineConfig({
  plugins: [marked()],
  build: {
    target: "es2022",
    outDir: OUT,
    emptyOutDir: true,
    lib: { entry: "src/main.ts", formats: ["iife"], name: "explorer", fileName: () => "explorer.js", cssFileName: "explorer" },
  },
});
