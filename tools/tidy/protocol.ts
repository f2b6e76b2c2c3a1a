/** The table of docs/protocol.md that says which step of the model is which function of the code. */

export const MODEL_PATH = "spec/coiommu.pml";

/** A name that the table says is defined in a file. */
export interface Place {
  readonly path: string;
  readonly name: string;
}

/** The rows under the header `| model | TypeScript | module |`. */
export function placesOf(markdown: string): Place[] {
  const lines = markdown.split("\n");
  const from = lines.indexOf("| model | TypeScript | module |") + 2;
  const rows = from < 2 ? [] : lines.slice(from);
  const end = rows.findIndex((row) => !row.startsWith("|"));
  return rows.slice(0, end < 0 ? undefined : end).flatMap((row) => {
    let path = MODEL_PATH;
    return [...row.matchAll(/`([^`]+)`(:?)/g)].flatMap(([, text, colon]) => {
      if (!colon) return [{ path, name: text! }];
      path = text!;
      return [];
    });
  });
}

const DEFINITIONS: Record<string, (name: string) => RegExp> = {
  pml: (name) => new RegExp(`^(?:(?:inline|proctype) ${name}\\(|${name}:)`, "m"),
  // A function, or a member of a class, whose header the formatter has put on one line or broken at its parentheses.
  ts: (name) =>
    new RegExp(
      `^(?:export )?function ${name}\\b|^  (?:async |protected )?#?${name}(?:<.*>)?\\((?:.*[^>] \\{$|(?:\\n    .*)*\\n  \\).* \\{$)`,
      "m",
    ),
  // Kernel style: a definition begins at the left margin, and its body with a brace there.
  c: (name) => new RegExp(`^\\w[\\w *]*\\b${name}\\([^;{]*\\n\\{`, "m"),
};

/** What of the table does not exist, or exists nowhere in the table: each problem as a line. */
export function protocolProblems(markdown: string, read: (path: string) => string | undefined): string[] {
  const places = placesOf(markdown);
  if (places.length === 0) return ["docs/protocol.md has no table of steps and code"];
  const gone = places.flatMap(({ path, name }) => {
    const text = read(path);
    if (text === undefined) return [`${path} does not exist`];
    const defined = DEFINITIONS[path.split(".").at(-1)!]?.(name).test(text);
    return defined
      ? []
      : [`${path} does not define ${name}: correct docs/protocol.md, and the model if need be`];
  });
  const named = new Set(places.filter((p) => p.path === MODEL_PATH).map((p) => p.name));
  const steps = [...(read(MODEL_PATH) ?? "").matchAll(/^(?:(?:inline|proctype) (\w+)\(|(\w+):(?!:))/gm)];
  const untold = steps.map((m) => m[1] ?? m[2]!).filter((step) => !named.has(step) && !OWN.has(step));
  return [...gone, ...untold.map((step) => `${MODEL_PATH}: step ${step} is not in the table`)];
}

/** Of the model alone: they stand for no code. */
const OWN = new Set(["next", "stopped", "tell", "guest"]);
