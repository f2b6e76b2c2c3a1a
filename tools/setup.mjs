// Runs before everything else on a fresh machine, so it needs no package and any Node that npm runs on.
import { spawnSync } from "node:child_process";
import { existsSync, statSync } from "node:fs";
import { fileURLToPath } from "node:url";

const path = (relative) => fileURLToPath(new URL(`../${relative}`, import.meta.url));
const installed = path("node_modules/.package-lock.json");
const modified = (file) => statSync(file).mtimeMs;

if (!existsSync(installed) || modified(installed) < modified(path("package-lock.json"))) {
  console.error("setup: installing the npm packages of package-lock.json (npm ci)");
  const { status } = spawnSync("npm", ["ci", "--no-audit", "--no-fund", "--loglevel=error"], {
    cwd: path("."),
    stdio: ["ignore", "ignore", "inherit"],
  });
  if (status !== 0) {
    console.error("setup: npm ci failed; its message is above");
    process.exit(1);
  }
}
