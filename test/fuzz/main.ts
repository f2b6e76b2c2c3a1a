/**
 * npm run fuzz -- --seconds N [--seed S] [--target NAME]   look for inputs that break something
 * npm run fuzz -- --run FILE [--target NAME]               run one input (- is stdin), and say what it does
 * npm run fuzz -- --grow --seconds N [--target NAME]       add what reaches new code to the corpus
 */
import { readFileSync, writeFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { corpusOf, save } from "./corpus.ts";
import { failureOf, fuzz, type Target } from "./fuzzer.ts";
import { targets } from "./targets.ts";
import { watched } from "./watchdog.ts";

const { values } = parseArgs({
  options: {
    seconds: { type: "string", default: "60" },
    seed: { type: "string" },
    target: { type: "string", multiple: true },
    run: { type: "string" },
    grow: { type: "boolean", default: false },
  },
});
const chosen = targets.filter((t) => values.target?.includes(t.name) ?? true);
if (chosen.length === 0) throw new Error(`--target is one of ${targets.map((t) => t.name).join(", ")}`);

function runOne(target: Target, input: Uint8Array): void {
  for (const line of target.explain(input)) console.log(line);
  const error = failureOf(target, input);
  console.log(error ? `\n${error.stack}` : "\nNothing is wrong.");
  if (error) process.exitCode = 1;
}

async function fuzzOne(target: Target, seconds: number, seed: number): Promise<void> {
  const corpus = corpusOf(target.name);
  const known = new Set(corpus);
  const grown: [Uint8Array, readonly string[]][] = [];
  const onFresh = (input: Uint8Array, fresh: readonly string[]) => {
    if (!known.has(input)) grown.push([input, fresh]);
  };
  const watchedTarget = await watched(target);
  const { inputs, blocks, finding } = fuzz(watchedTarget, { limit: { seconds }, seed, corpus, onFresh });
  watchedTarget.close();
  console.log(`${target.name}: ${inputs} inputs, ${blocks} blocks of src/ reached, seed ${seed}`);
  if (values.grow && !finding) for (const found of grown) console.log(`  ${save(target, ...found)}`);
  if (!finding) return;
  const file = `finding-${target.name}.bin`;
  writeFileSync(file, finding.input);
  console.log(`${finding.error.stack}\nRun it alone: npm run fuzz -- --target ${target.name} --run ${file}`);
  process.exitCode = 1;
}

if (values.run !== undefined) runOne(chosen[0]!, readFileSync(values.run === "-" ? 0 : values.run));
else {
  const seed = Number(values.seed ?? Math.floor(Math.random() * 2 ** 31));
  for (const target of chosen) await fuzzOne(target, Number(values.seconds) / chosen.length, seed);
}
