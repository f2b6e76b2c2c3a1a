import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import test from "node:test";
import { MODEL_PATH, placesOf, protocolProblems } from "./protocol.ts";

const root = new URL("../../", import.meta.url);
const read = (path: string): string | undefined => {
  const file = new URL(path, root);
  return existsSync(file) ? readFileSync(file, "utf8") : undefined;
};
const markdown = read("docs/protocol.md") ?? "";
const places = placesOf(markdown);

test("every step and function that docs/protocol.md names exists, and every step is named", () => {
  assert.ok(places.length > 60);
  assert.deepEqual(protocolProblems(markdown, read), []);
});

test("broken twins: each name that goes is missed, in its file", () => {
  for (const { path, name } of places) {
    const renamed = (file: string) => {
      const text = read(file);
      return file === path ? text?.replaceAll(new RegExp(`\\b${name}\\b`, "g"), `${name}2`) : text;
    };
    assert.ok(
      protocolProblems(markdown, renamed).some((p) => p.startsWith(`${path} does not define ${name}:`)),
      `${path}: ${name}`,
    );
  }
});

test("broken twins: a name that is only called, commented or declared is not defined", () => {
  const table = (path: string) =>
    `| model | TypeScript | module |\n|---|---|---|\n| | \`${path}\`: \`f\` | |\n`;
  const problems = (path: string, text: string) =>
    protocolProblems(table(path), (file) => (file === path ? text : undefined));
  const broken: Record<string, readonly string[]> = {
    "a.ts": [
      "f();\n",
      "  this.f();\n",
      "  f(a, b);\n",
      "  // f() {\n",
      "  if (f(a)) {\n",
      "  return f(() => {\n",
      "  f(() => {\n",
      "  f(\n    a,\n  );\n",
    ],
    "a.c": ["int f(void);\n", "int g(void)\n{\n\tf();\n}\n", "/* f() */\nint g(void)\n{\n"],
    [MODEL_PATH]: ["goto f;\n", "\tf(x);\n", "/* f: */\n"],
    "a.txt": ["f"],
  };
  for (const [path, texts] of Object.entries(broken))
    for (const text of texts) assert.equal(problems(path, text).length, 1, text);
  const sound: Record<string, readonly string[]> = {
    "a.ts": [
      "  f(): void {\n",
      "  #f(a: { b: B; c: C }[]): D {\n",
      "  async f<T>(\n    a: T,\n  ): B {\n",
      "export function f(",
    ],
    "a.c": ["int f(void)\n{\n", "void f(int a,\n\tint b) __must_hold(x)\n{\n"],
    [MODEL_PATH]: ["f:\tx = 1\n", "inline f() {\n", "proctype f(bit a) {\n"],
  };
  for (const [path, texts] of Object.entries(sound))
    for (const text of texts) assert.deepEqual(problems(path, text), [], text);
});

test("broken twins: a table that is gone, a file that is gone, and a step that is not told are found", () => {
  assert.deepEqual(protocolProblems("| model |\n", read), [
    "docs/protocol.md has no table of steps and code",
  ]);
  assert.ok(protocolProblems(markdown, () => undefined).includes(`${MODEL_PATH} does not exist`));
  const more = (path: string) => (path === MODEL_PATH ? `${read(path)}\nanother:\tskip\n` : read(path));
  assert.deepEqual(protocolProblems(markdown, more), [`${MODEL_PATH}: step another is not in the table`]);
});
