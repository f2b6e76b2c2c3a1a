#!/usr/bin/env node
// Runs from source in a checkout (Node strips the types) and from dist/ in the published package.
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import module from "node:module";
import { homedir } from "node:os";

const path = (relative) => new URL(relative, import.meta.url);
const source = path("../src/cli/main.ts");
const pinned = path("../node_modules/node/bin/node");

if (Number.parseInt(process.versions.node, 10) >= 24) {
  // Threads start several times faster from code that is stripped and compiled; they find the cache by the variable.
  process.env.NODE_COMPILE_CACHE ??= `${process.env.XDG_CACHE_HOME || `${homedir()}/.cache`}/coiommu/compiled`;
  module.enableCompileCache();
  const main = existsSync(source) ? source : path("../dist/cli/main.js");
  await import(main.href);
} else if (existsSync(pinned)) {
  const child = spawn(pinned.pathname, process.argv.slice(1), { stdio: "inherit" });
  // A terminal signals both of us; what is sent to this process alone is passed on.
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"])
    process.on(signal, () => signal === "SIGINT" || child.kill(signal));
  child.on("exit", (code) => process.exit(code ?? 1));
} else {
  console.error(
    `coiommu: needs Node 24 or newer, and this is Node ${process.versions.node}: run it with a newer Node`,
  );
  process.exitCode = 2;
}
