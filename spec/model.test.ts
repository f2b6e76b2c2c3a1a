import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test, { describe } from "node:test";
import { UserError } from "../src/base/errors.ts";
import { ensureHostTools } from "../src/machine/qemu/packages.ts";
import { ASSERTIONS, RUNS, TWINS } from "./runs.ts";
import { check, MODEL, propertyOf, SPEC_TOOLS, type Verdict, verdict } from "./spin.ts";

/** In CI a missing tool is a failure. */
let skip: string | false = false;
try {
  await ensureHostTools((text) => console.error(text), SPEC_TOOLS, "the check of the protocol's model");
} catch (error) {
  if (!(error instanceof UserError) || process.env.CI === "true") throw error;
  console.error(error.message);
  skip = "its tools are missing";
}

const verdicts: Verdict[] = [];
// Two at a time need 1.5 GB.
describe("model", { concurrency: 2 }, () => {
  for (const [what, run] of Object.entries(RUNS))
    test(what, { skip }, async (t) => {
      const result = await check(run);
      t.diagnostic(`${result.states} states, ${result.seconds} s`);
      assert.equal(result.found, undefined);
      assert.ok(result.states > 10_000, "a model in which little happens shows little");
      verdicts.push(result);
    });
});

describe("model: broken twins are rejected", { concurrency: 2 }, () => {
  for (const [what, { macro, run, finds }] of Object.entries(TWINS))
    test(what, { skip }, async () => {
      assert.equal((await check(run, macro)).found, finds);
    });
});

test("model: every line is reached in some configuration", { skip }, () => {
  assert.equal(verdicts.length, Object.keys(RUNS).length);
  const reached = new Set(verdicts.flatMap((v) => [...v.lines].filter((line) => !v.unreached.has(line))));
  const all = new Set(verdicts.flatMap((v) => [...v.lines]));
  assert.ok(all.size > 100);
  const source = readFileSync(MODEL, "utf8").split("\n");
  const never = [...all].filter((line) => !reached.has(line));
  assert.deepEqual(
    never.map((line) => `${line}: ${source[Number(line.split(":")[1]) - 1]?.trim()}`),
    [],
  );
});

test("model: every assertion has a name, and every name an assertion", { skip }, () => {
  const names = verdicts.flatMap((v) => v.assertions).map((a) => propertyOf(a) ?? a);
  assert.deepEqual([...new Set(names)].sort(), Object.keys(ASSERTIONS).sort());
});

test("every twin of the model is checked, and there are no others", () => {
  const inModel = [...readFileSync(MODEL, "utf8").matchAll(/^#ifn?def TWIN_(\w+)/gm)].map((m) => m[1]!);
  assert.deepEqual(
    [...new Set(inModel)].sort(),
    [...new Set(Object.values(TWINS).map((twin) => twin.macro))].sort(),
  );
});

// --- a search that is not exhaustive is no verdict ----------------------------------------------------------------

const quota = RUNS["a quota of one frame, with unpins inside requests"]!;
test("model: a search that is cut short by its depth is rejected", { skip }, () =>
  assert.rejects(check(quota, undefined, { memoryMb: 1000, depth: 1000 }), /depth too small/),
);
test("model: a search that is cut short by its memory is rejected", { skip }, () =>
  assert.rejects(check(quota, undefined, { memoryMb: 180, depth: 500_000 }), /MEMLIM/),
);

const OUTPUT = `
(Spin Version 6.5.2 -- 6 December 2019)
Full statespace search for:
State-vector 64 byte, depth reached 9, errors: 0
       42 states, stored
unreached in proctype cpu
	a.pml:2, state 2, "skip"
	a.pml:9, state 3, "-end-"
	(2 of 3 states)
pan: elapsed time 0.5 seconds
`;
const GENERATED = `
		 /* PROC cpu */
	case 3: // STATE 1 - a.pml:1 - [x = 1] (0:0:0 - 1)
		spin_assert((now.held&1), "(allowed&1)", II, tt, t);
	case 4: // STATE 2 - a.pml:2 - [skip] (0:0:0 - 1)
	case 5: // STATE 3 - a.pml:9 - [-end-] (0:0:0 - 1)
`;
test("what pan prints is understood", () => {
  assert.deepEqual(verdict(OUTPUT, GENERATED), {
    found: undefined,
    states: 42,
    seconds: 0.5,
    assertions: ["(allowed&1)"],
    lines: new Set(["cpu:1", "cpu:2"]),
    unreached: new Set(["cpu:2"]),
  });
  const failed = (message: string) =>
    verdict(OUTPUT.replace("errors: 0", "errors: 1").replace("\n", `\npan:1: ${message} (at depth 7)\n`), "");
  assert.equal(failed("assertion violated (allowed&1)").found, "a device was refused a frame that is mapped");
  assert.equal(failed("invalid end state").found, "stuck");
  assert.equal(failed("acceptance cycle").found, "acceptance cycle");
  assert.throws(() => failed("assertion violated (x==1)"), /no name/);
});

for (const [what, output] of Object.entries({
  "that counts errors it does not tell": OUTPUT.replace("errors: 0", "errors: 1"),
  "that was not completed": `Warning: Search not completed\n${OUTPUT}`,
  "that was too shallow": `error: max search depth too small\n${OUTPUT}`,
  "by bit state": OUTPUT.replace("Full statespace", "Bit statespace"),
  "that says nothing": "",
}))
  test(`a search ${what} is rejected`, () => assert.throws(() => verdict(output, GENERATED)));
