/**
 * The structure of this repository as rules over file texts: which folder imports what, who alone may do what, how
 * long things get, and what no file contains. Each problem names the file, the rule, and what to do instead.
 */
import path from "node:path";

export interface Source {
  /** From the root of the repository, with slashes. */
  readonly path: string;
  readonly text: string;
}
/** What is wrong, without the file's name. */
export type Rule = (source: Source) => string[];

const CORE = ["base", "wire", "memory", "policy", "tracking", "virtio", "transport", "device", "driver"];
const PRODUCT = [...CORE, "host", "machine", "control"];

/** Folders of src/ that a folder may import, beside itself. `types`: with `import type` only. */
const IMPORTS: Record<string, { readonly code: readonly string[]; readonly types?: readonly string[] }> = {
  base: { code: [] },
  wire: { code: ["base"] },
  memory: { code: ["base"] },
  policy: { code: ["base"] },
  tracking: { code: ["base", "wire", "memory", "policy"] },
  virtio: { code: ["base", "wire", "memory", "tracking"] },
  transport: { code: ["base", "wire", "memory", "virtio"] },
  device: { code: ["base", "wire", "memory", "virtio"] },
  host: { code: ["base", "wire", "memory"], types: ["tracking", "transport"] },
  driver: { code: ["base", "wire", "memory", "virtio"] },
  sim: { code: CORE },
  replay: { code: CORE },
  evaluate: { code: ["base", "replay", "sim"] },
  machine: { code: [...CORE, "host"] },
  control: { code: [...CORE, "host", "machine"] },
  dashboard: { code: ["base"], types: ["control"] },
  cli: { code: [...PRODUCT, "sim", "replay", "evaluate", "dashboard"] },
};

const isTest = (file: string): boolean => file.endsWith(".test.ts") || file.startsWith("test/");
const folderOf = (file: string): string | undefined => /^src\/([^/]+)\//.exec(file)?.[1];
const isProduct = (file: string): boolean => folderOf(file) !== undefined && !isTest(file);

/** Without comments. Enough for code that the formatter has seen: block comments begin a line. */
const codeOf = (text: string): string => text.replace(/^\s*\/\*[\s\S]*?\*\//gm, "").replace(/\/\/.*$/gm, "");

interface Import {
  readonly from: string;
  readonly typeOnly: boolean;
}

function importsOf(text: string): Import[] {
  const statement = /^(?:import|export)\s+(type\s)?(?:[^"';]*?from\s*)?"([^"]+)"/gm;
  const dynamic = /\bimport\(\s*"([^"]+)"/g;
  const code = codeOf(text);
  return [
    ...[...code.matchAll(statement)].map((m) => ({ from: m[2]!, typeOnly: m[1] !== undefined })),
    ...[...code.matchAll(dynamic)].map((m) => ({ from: m[1]!, typeOnly: false })),
  ];
}

export const importDirections: Rule = (source) => {
  const folder = folderOf(source.path);
  if (!folder || isTest(source.path)) return [];
  const allowed = IMPORTS[folder];
  if (!allowed)
    return [`src/${folder}/ is not a folder of the architecture: add it to the table in tools/tidy/rules.ts`];
  return importsOf(source.text).flatMap(({ from, typeOnly }) => {
    if (!from.startsWith(".")) return [];
    const target = path.posix.join(path.posix.dirname(source.path), from);
    if (isTest(target)) return [`imports test code (${from}): move what both need into src/`];
    const other = folderOf(target);
    if (!other) return [`imports ${from}, which is not in src/: product code stands alone`];
    if (other === folder || allowed.code.includes(other)) return [];
    if (!allowed.types?.includes(other))
      return [
        `${folder} may not import ${other}: take what it needs as an argument, behind an interface of its own`,
      ];
    return typeOnly ? [] : [`${folder} may import types of ${other} only: write "import type"`];
  });
};

interface Right {
  readonly what: string;
  readonly pattern: RegExp;
  /** Folders of src/ that have it. */
  readonly folders: readonly string[];
  readonly instead: string;
}
const WAITING = ["host", "machine", "control", "cli"];
const RIGHTS: readonly Right[] = [
  {
    what: "FFI",
    pattern: /["']koffi["']/,
    folders: ["host"],
    instead: "bind the call in src/host/libc.ts",
  },
  {
    what: "Atomics",
    pattern: /\bAtomics\b/,
    folders: ["memory"],
    instead: "use GuestMemory or SharedWords of src/memory/",
  },
  {
    what: "a clock",
    pattern: /\bDate\.now\b|\bnew Date\(\)|\bperformance\b|\bhrtime\b|["']node:perf_hooks["']/,
    folders: WAITING,
    instead: "take a Clock (src/base/clock.ts) as an argument",
  },
  {
    what: "a timer",
    pattern: /\bset(?:Timeout|Interval|Immediate)\b|["']node:timers/,
    folders: WAITING,
    instead: "let the caller call when it is time",
  },
  {
    what: "randomness",
    pattern: /\bMath\.random\b|\brandom(?:Bytes|UUID|Int|Fill|FillSync)\b|\bgetRandomValues\b/,
    folders: ["host"],
    instead: "take a seed or a generator as an argument",
  },
  {
    what: "a module of Node",
    pattern: /["']node:/,
    folders: [...WAITING, "device", "evaluate", "replay", "sim"],
    instead: "take what it does as an argument: the core runs anywhere",
  },
];

export const exclusiveRights: Rule = (source) => {
  if (!isProduct(source.path)) return [];
  const code = codeOf(source.text);
  return RIGHTS.filter((r) => !r.folders.includes(folderOf(source.path)!) && r.pattern.test(code)).map(
    (r) => `uses ${r.what}, which only src/{${r.folders}} may: ${r.instead}`,
  );
};

export const FILE_LINES_MAX = 450;
export const FUNCTION_LINES_MAX = 70;

export const fileLength: Rule = ({ path: file, text }) => {
  const lines = text.split("\n").length - 1;
  if (!file.endsWith(".ts") || lines <= FILE_LINES_MAX) return [];
  return [`has ${lines} lines, more than ${FILE_LINES_MAX}: split it by purpose`];
};

/** A line that opens the body of a function: `function f(…) {`, `=> {`, a method, or the end of a broken header. */
const OPENS = [
  /\bfunction\b.*\{$/,
  /=> \{$/,
  /^\s*\)(?:: .*)? \{$/,
  /^\s*(?:(?:static|async|get|set|override|public|private|protected) |\*)*#?\w+(?:<.*>)?\(.*\)(?:: .*)? \{$/,
];
const NOT_A_FUNCTION = /^\s*(?:\} else )?(?:if|for|while|switch|catch|do)\b/;

/** By indentation, which the formatter guarantees: a body ends at the first `}` as far left as its first line. */
export const functionLength: Rule = ({ path: file, text }) => {
  if (!file.endsWith(".ts")) return [];
  const lines = text.split("\n");
  const indent = (line: string) => line.length - line.trimStart().length;
  return lines.flatMap((line, start) => {
    if (!OPENS.some((o) => o.test(line)) || NOT_A_FUNCTION.test(line)) return [];
    const after = lines.slice(start + 1);
    const length = after.findIndex((l) => l.trimStart().startsWith("}") && indent(l) <= indent(line)) + 2;
    if (length <= FUNCTION_LINES_MAX) return [];
    return [`line ${start + 1}: a function of ${length} lines, more than ${FUNCTION_LINES_MAX}: split it`];
  });
};

// Written in parts, so that this file does not break its own rules.
const MARKS = new RegExp(`\\b(?:${["TO" + "DO", "FIX" + "ME", "X" + "XX"].join("|")})\\b`);
export const unfinished: Rule = ({ text }) =>
  text.split("\n").flatMap((line, i) => {
    const mark = MARKS.exec(line)?.[0];
    return mark ? [`line ${i + 1}: ${mark}: finish it, or say in docs/ what is missing`] : [];
  });

/** Homes of users, and the directory `checkout` in which this repository lies now, unless its name says nothing. */
export const machinePaths = (checkout: string): Rule => {
  const literal = checkout.replace(/\/$/, "").replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const telling = checkout.split("/").filter(Boolean).length > 1;
  const pattern = new RegExp(`/(?:home|Users)/[\\w.-]+${telling ? `|${literal}(?![\\w-])` : ""}`);
  return ({ text }) => {
    const found = pattern.exec(text)?.[0];
    return found ? [`has the path ${found} of one machine: make it relative, or an argument`] : [];
  };
};

/** Where packages come from is the user's configuration. */
const HOSTS =
  /\bregistry\.[\w-]+\.\w+|\b(?:deb|ftp|security|snapshot)\.debian\.org|[\w.-]*(?:artifactory|jfrog|verdaccio)[\w.-]*\.\w+|^\s*registry\s*=|"resolved":\s*"http/m;
export const registryHosts: Rule = ({ text }) => {
  const found = HOSTS.exec(text)?.[0];
  return found ? [`names a package host (${found.trim()}): leave that to the user's configuration`] : [];
};

/** docs/adr/NNNN-title.md, each number once. */
export function decisionNumbers(paths: readonly string[]): string[] {
  const seen = new Map<string, string>();
  return paths
    .filter((p) => p.startsWith("docs/adr/") && p.endsWith(".md"))
    .flatMap((p) => {
      const number = /^docs\/adr\/(\d{4})-[a-z0-9-]+\.md$/.exec(p)?.[1];
      if (!number) return [`${p}: is not named NNNN-title.md: give it the next free number`];
      const other = seen.get(number);
      seen.set(number, p);
      return other ? [`${p}: has the number of ${other}: give it the next free one`] : [];
    });
}
