import { defineConfig } from "vite";

/** One script and one style, which the program puts into its page: src/twofold/report/web. */
export default defineConfig({
  build: {
    target: "es2022",
    outDir: "../src/twofold/report/web",
    emptyOutDir: true,
    lib: { entry: "src/main.ts", formats: ["iife"], name: "explorer", fileName: () => "explorer.js", cssFileName: "explorer" },
  },
});
