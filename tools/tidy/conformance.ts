/** The tables of docs/abi.md that say which test shows what the standard and this ABI demand. */

const HEADER = "| section | what | test |";

/** A test that a row names, or a case that a test runs, and the file that it is in. */
export interface NamedTest {
  readonly row: string;
  readonly path: string;
  readonly title: string;
}

/** The rows under each header; a test cell is `path`: `title`, `title`, and so on. */
export function rowsOf(markdown: string): { readonly row: string; readonly tests: NamedTest[] }[] {
  let inside = false;
  return markdown.split("\n").flatMap((line) => {
    if (line === HEADER) inside = true;
    else if (!line.startsWith("|")) inside = false;
    if (!inside || line === HEADER || /^[|-]+$/.test(line)) return [];
    const cells = line.split("|").slice(1, -1);
    let path = "";
    const tests = [...(cells[2] ?? "").matchAll(/`([^`]+)`(:?)/g)].flatMap(([, text, colon]) => {
      if (!colon) return [{ row: line, path, title: text! }];
      path = text!;
      return [];
    });
    return [{ row: line, tests }];
  });
}

const literally = (text: string): string => text.replaceAll(/[.*+?^${}()|[\]\\]/g, "\\$&");

/** The titles that a test file gives its tests: each with what is put into a template. */
function titlesIn(text: string): RegExp[] {
  const titles = [...text.matchAll(/\b(?:test|holds)\(\s*(["`])((?:(?!\1)[^\\]|\\.)*)\1/g)];
  return titles.map(([, , title]) => {
    const parts = title!.split(/\$\{(?:[^{}]|\{[^{}]*\})*\}/);
    return new RegExp(`^${parts.map((part) => literally(part)).join("(.*)")}$`);
  });
}

/** Whether a file has a test of this title; in a file of cases, whether it has a case of this name. */
export function hasTest(path: string, text: string, title: string): boolean {
  const named = (name: string) => new RegExp(`["\`]${literally(name)}["\`]`).test(text);
  if (!path.endsWith(".test.ts")) return named(title);
  return titlesIn(text).some((pattern) => {
    // Words that a template puts in are in the file too; a number may come from a constant.
    const found = pattern.exec(title);
    return found?.slice(1).every((put) => /^(?:0x[0-9a-f]+|\d+)$/.test(put) || appears(text, put)) ?? false;
  });
}

/** As a string, as the name of a property, or as part of a title's own expression. */
const appears = (text: string, put: string): boolean =>
  new RegExp(`["\`]${literally(put)}["\`]|^ *${literally(put)}:`, "m").test(text);

/** Rows without a test, and tests that do not exist: each problem as a line. */
export function conformanceProblems(markdown: string, read: (path: string) => string | undefined): string[] {
  const rows = rowsOf(markdown);
  if (rows.length === 0) return ["docs/abi.md has no table of what is demanded and tested"];
  return rows.flatMap(({ row, tests }) => {
    if (tests.length === 0) return [`no test is named: ${row}`];
    return tests.flatMap(({ path, title }) => {
      const text = read(path);
      if (text === undefined) return [`${path || "no file"} does not exist: ${title}`];
      return hasTest(path, text, title) ? [] : [`${path} has no test "${title}"`];
    });
  });
}
