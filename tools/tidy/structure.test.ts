import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { existsSync, readFileSync, statSync } from "node:fs";
import test from "node:test";
import type { Rule, Source } from "./rules.ts";
import * as rules from "./rules.ts";

const root = new URL("../../", import.meta.url);

/** What is in the repository, or about to be: tracked, and new files that are not ignored. */
const paths = execFileSync("git", ["ls-files", "-co", "--exclude-standard", "-z"], {
  cwd: root,
  encoding: "utf8",
})
  .split("\0")
  .filter((p) => p && existsSync(new URL(p, root)) && statSync(new URL(p, root)).isFile());

const sources: readonly Source[] = paths
  .map((path) => ({ path, bytes: readFileSync(new URL(path, root)) }))
  .filter(({ bytes }) => !bytes.includes(0))
  .map(({ path, bytes }) => ({ path, text: bytes.toString("utf8") }));

const problems = (rule: Rule, files: readonly Source[]): string[] =>
  files.flatMap((s) => rule(s).map((problem) => `${s.path}: ${problem}`));

const dotted = (...parts: string[]) => parts.join(".");
const slashed = (...parts: string[]) => parts.join("/");
const CHECKOUT = slashed("", "srv", "ann", "coiommu");
const body = (lines: number) => "  x();\n".repeat(lines);
const source = (path: string, text: string): Source => ({ path, text });

interface Twins {
  readonly rule: Rule;
  /** Each must be found. */
  readonly broken: readonly Source[];
  /** None may be. */
  readonly sound: readonly Source[];
}
const table: Record<string, Twins> = {
  "folders import what the architecture allows": {
    rule: rules.importDirections,
    broken: [
      source("src/base/a.ts", 'import { x } from "../wire/b.ts";'),
      source("src/policy/a.ts", 'import type { x } from "../memory/b.ts";'),
      source("src/virtio/a.ts", 'import {\n  x,\n} from "../policy/b.ts";'),
      source("src/virtio/a.ts", 'export * from "../host/b.ts";'),
      source("src/tracking/a.ts", 'import "../host/b.ts";'),
      source("src/tracking/a.ts", 'const { x } = await import("../host/b.ts");'),
      source("src/host/a.ts", 'import { x } from "../tracking/b.ts";'),
      source("src/host/a.ts", 'import type { x } from "../virtio/b.ts";'),
      source("src/machine/qemu/a.ts", 'import { x } from "../../control/b.ts";'),
      source("src/control/a.ts", 'import { x } from "../sim/b.ts";'),
      source("src/machine/embedded/a.ts", 'import { x } from "../../cli/b.ts";'),
      source("src/base/a.ts", 'import { x } from "./a.test.ts";'),
      source("src/cli/a.ts", 'import { x } from "../../test/support/b.ts";'),
      source("src/cli/a.ts", 'import { x } from "../../tools/b.ts";'),
      source("src/misc/a.ts", ""),
    ],
    sound: [
      source("src/base/a.ts", 'import { x } from "./b.ts";'),
      source(
        "src/tracking/a.ts",
        'import { x } from "../wire/b.ts";\nimport type { y } from "../policy/c.ts";',
      ),
      source("src/tracking/a.test.ts", 'import { x } from "../../test/support/b.ts";'),
      source("src/host/a.ts", 'import type { x } from "../tracking/b.ts";'),
      source("src/control/a.ts", 'import { x } from "../machine/qemu/b.ts";\nimport fs from "node:fs";'),
      source("src/cli/a.ts", 'import { x } from "../replay/b.ts";'),
      source("src/base/a.ts", '/**\n import { x } from "../wire/b.ts";\n */'),
    ],
  },
  "what only some folders may do is done there": {
    rule: rules.exclusiveRights,
    broken: [
      source("src/memory/a.ts", 'import koffi from "koffi";'),
      source("src/tracking/a.ts", "Atomics.load(words, 0);"),
      source("src/host/a.ts", "const { load } = Atomics;"),
      source("src/virtio/a.ts", "Date.now();"),
      source("src/policy/a.ts", "const t = new Date();"),
      source("src/tracking/a.ts", "performance.now();"),
      source("src/device/a.ts", "process.hrtime.bigint();"),
      source("src/tracking/a.ts", "setTimeout(() => {}, 1);"),
      source("src/device/a.ts", "setImmediate(f);"),
      source("src/policy/a.ts", "Math.random();"),
      source("src/control/a.ts", 'import { randomUUID } from "node:crypto";'),
      source("src/transport/a.ts", 'import fs from "node:fs";'),
    ],
    sound: [
      source("src/host/a.ts", 'import koffi from "koffi";\nprocess.hrtime();\nMath.random();'),
      source("src/memory/a.ts", "Atomics.load(words, 0);"),
      source("src/control/a.ts", "setTimeout(() => {}, 1);"),
      source("src/tracking/a.ts", "/** Atomics and Date.now() in a comment. */\n// Math.random()\n"),
      source("src/tracking/a.test.ts", 'import test from "node:test";\nMath.random();'),
    ],
  },
  "no file is too long": {
    rule: rules.fileLength,
    broken: [source("src/base/a.ts", "x();\n".repeat(rules.FILE_LINES_MAX + 1))],
    sound: [
      source("src/base/a.ts", "x();\n".repeat(rules.FILE_LINES_MAX)),
      source("data.json", "1\n".repeat(9999)),
    ],
  },
  "no function is too long": {
    rule: rules.functionLength,
    broken: [
      source("a.ts", `export function f(): void {\n${body(69)}}\n`),
      source("a.ts", `export async function* f<T>(\n  a: T,\n): AsyncGenerator<T> {\n${body(69)}}\n`),
      source("a.ts", `const f = (a: number) => {\n${body(69)}};\n`),
      source("a.ts", `test("x", () => {\n${body(69)}});\n`),
      source("a.ts", `class C {\n  override #f(a: Map<string, number>): void {\n${body(69)}  }\n}\n`),
    ],
    sound: [
      source("a.ts", `export function f(): void {\n${body(68)}}\n`),
      source("a.ts", `class C {\n${"  f(): void {\n    x();\n  }\n".repeat(50)}}\n`),
      source("a.ts", `const table = {\n${body(300)}};\n`),
      source("a.ts", `for (const a of b()) {\n${body(300)}}\n`),
    ],
  },
  "nothing is left unfinished": {
    rule: rules.unfinished,
    broken: ["TO" + "DO", "FIX" + "ME", "X" + "XX"].map((mark) =>
      source("guest/linux/a.c", `/* ${mark}: later */\n`),
    ),
    sound: [source("a.sh", "mktemp /tmp/a.XXXXXX\n")],
  },
  "no file has a path of one machine": {
    rule: rules.machinePaths(`${CHECKOUT}/`),
    broken: [
      source("a.ts", `const a = "${slashed("", "home", "ann", "x")}";`),
      source("a.md", `see ${slashed("", "Users", "ann")}`),
      source("a.ts", `const a = "${CHECKOUT}/x";`),
    ],
    sound: [source("a.ts", `const a = "/usr/bin/env"; // $HOME/x, ${CHECKOUT}-2`)],
  },
  "no file names a package host": {
    rule: rules.registryHosts,
    broken: [
      source("package-lock.json", JSON.stringify({ resolved: "https://packages.example/x" })),
      source("a.md", `from ${dotted("registry", "npmjs", "org")}`),
      source(".npmrc", ["registry", "https://packages.example"].join("=")),
      source("a.sh", `curl http://${dotted("deb", "debian", "org")}/debian`),
      source("a.yml", `image: ${dotted("acme", "jfrog", "io")}/node`),
    ],
    sound: [source("README.md", "npm install coiommu; see https://www.debian.org/ and the registry.")],
  },
};

test("no file has a path of this checkout", () =>
  assert.deepEqual(problems(rules.machinePaths(root.pathname), sources), []));

for (const [what, { rule, broken, sound }] of Object.entries(table)) {
  test(what, () => assert.deepEqual(problems(rule, sources), []));
  test(`${what}: broken twins are found, sound ones are not`, () => {
    for (const s of broken)
      assert.equal(rule(s).length > 0, true, `not found: ${s.path}: ${s.text.slice(0, 200)}`);
    assert.deepEqual(problems(rule, sound), []);
  });
}

test("decisions are numbered, each with its own number", () =>
  assert.deepEqual(rules.decisionNumbers(paths), []));

test("decisions are numbered: broken twins are found", () => {
  const twins = [
    "docs/adr/0001-a.md",
    "docs/adr/0001-b.md",
    "docs/adr/two.md",
    "docs/adr/0003-c.md",
    "docs/x.md",
  ];
  assert.deepEqual(
    rules.decisionNumbers(twins).map((p) => p.split(":")[0]),
    ["docs/adr/0001-b.md", "docs/adr/two.md"],
  );
});

test("the check sees the repository", () => {
  for (const path of ["src/tracking/tracker.ts", "src/host/libc.ts", "tools/tidy/rules.ts", "package.json"])
    assert.ok(
      sources.some((s) => s.path === path),
      path,
    );
});
