/** Inputs that are kept: corpus/TARGET/NAME, named after the code that each was the first to reach. */
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { takeCoverage } from "./coverage.ts";
import { minimized, type Target } from "./fuzzer.ts";

const directory = (target: string) => new URL(`corpus/${target}/`, import.meta.url);

export function corpusOf(target: string): Uint8Array[] {
  if (!existsSync(directory(target))) return [];
  return readdirSync(directory(target))
    .sort()
    .map((name) => new Uint8Array(readFileSync(new URL(name, directory(target)))));
}

/** What says most about an input comes first: the tracker's code, not the struct that it reads. */
const TELLING = ["tracking", "virtio", "device", "policy", "transport", "memory", "base", "wire"];

function mostTelling(blocks: readonly string[]): string {
  const rank = (block: string) => {
    const [file, fn] = block.split(" ") as [string, string];
    return 2 * TELLING.indexOf(file.split("/")[0]!) + (fn ? 0 : 1);
  };
  return [...blocks].sort((a, b) => rank(a) - rank(b))[0]!;
}

/** Keep `input`, made as small as it gets while it reaches the most telling of `blocks`. Returns the file's name. */
export function save(target: Target, input: Uint8Array, blocks: readonly string[]): string {
  const block = mostTelling(blocks);
  const small = minimized(target, input, (candidate) => {
    takeCoverage();
    target.run(candidate);
    return takeCoverage().includes(block);
  });
  const [file, fn] = block.split(" ") as [string, string];
  const name = `${file.split("/").at(-1)}-${fn.replaceAll(/\W/g, "") || "callback"}`;
  mkdirSync(directory(target.name), { recursive: true });
  for (let n = 1; ; n++) {
    const path = new URL(`${name}${n > 1 ? `-${n}` : ""}.bin`, directory(target.name));
    if (existsSync(path)) continue;
    writeFileSync(path, small);
    return path.pathname.split("/").at(-1)!;
  }
}
