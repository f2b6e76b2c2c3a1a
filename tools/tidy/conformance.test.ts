import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import test from "node:test";
import { conformanceProblems, hasTest, rowsOf } from "./conformance.ts";

const root = new URL("../../", import.meta.url);
const read = (path: string): string | undefined => {
  const file = new URL(path, root);
  return path && existsSync(file) ? readFileSync(file, "utf8") : undefined;
};
const markdown = read("docs/abi.md") ?? "";
const named = rowsOf(markdown).flatMap(({ tests }) => tests);

test("every row of docs/abi.md names a test, and every test that it names exists", () => {
  assert.ok(named.length > 100);
  assert.deepEqual(conformanceProblems(markdown, read), []);
});

test("broken twins: each test that goes, or is called something else, is missed", () => {
  for (const { path, title } of named) {
    const other = markdown.replaceAll(`\`${title}\``, `\`${title} no more\``);
    assert.ok(
      conformanceProblems(other, read).includes(`${path} has no test "${title} no more"`),
      `${path}: ${title}`,
    );
    const gone = conformanceProblems(markdown, (file) => (file === path ? "" : read(file)));
    assert.ok(gone.includes(`${path} has no test "${title}"`), `${path}: ${title}`);
  }
});

test("broken twins: a row without a test, a file that is gone, and tables that are gone are found", () => {
  const table = (cell: string) => `| section | what | test |\n|---|---|---|\n| 1 | all | ${cell} |\n`;
  assert.deepEqual(conformanceProblems("# ABI\n", read), [
    "docs/abi.md has no table of what is demanded and tested",
  ]);
  assert.deepEqual(conformanceProblems(table(""), read), ["no test is named: | 1 | all |  |"]);
  assert.deepEqual(
    conformanceProblems(table("`a.test.ts`: `b`"), () => undefined),
    ["a.test.ts does not exist: b"],
  );
  assert.deepEqual(conformanceProblems(table("`b`"), read), ["no file does not exist: b"]);
});

test("titles of templates are those that the file can give", () => {
  const text = `for (const [what, n] of [["one", N], ["a b", 2]])
  test(\`\${what} is \${f({ n })}\`, () => {});
`;
  const found = (title: string) => hasTest("a.test.ts", text, title);
  assert.deepEqual(["one is 7", "a b is 0x1f"].map(found), [true, true]);
  assert.deepEqual(["two is 7", "one is not", "one is", "a is 7"].map(found), [false, false, false, false]);
});

test("what is only called, commented out or said in a file is no test", () => {
  for (const text of ['run("a");', "// it does a", 'tests("a", f);', 'test("a b", f);'])
    assert.equal(hasTest("x.test.ts", text, "a"), false, text);
  for (const text of ['test("a", f);', "  test(`a`, f);", 'holds(\n  "a",\n  f);'])
    assert.equal(hasTest("x.test.ts", text, "a"), true, text);
  assert.equal(hasTest("x.ts", '  { name: "a" }', "a"), true);
});
