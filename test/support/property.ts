/**
 * Properties as tests. A failure prints how to run the failing case alone:
 * REPLAY=seed/path[/commands] (commands: only where the property plays commands()).
 */
import assert from "node:assert/strict";
import test from "node:test";
import fc from "fast-check";

const [seed, path, commandsPath] = process.env.REPLAY?.split("/") ?? [];
const replay = seed === undefined ? {} : { seed: Number(seed), ...(path && { path }), endOnFailure: true };

/** Commands against a model, for fc.modelRun. */
export function commands<Model extends object, Real>(
  each: fc.Arbitrary<fc.Command<Model, Real>>[],
  commandsMax: number,
): fc.Arbitrary<Iterable<fc.Command<Model, Real>>> {
  const options = { maxCommands: commandsMax, size: "max" } as const;
  return fc.commands(each, { ...options, ...(commandsPath && { replayPath: commandsPath }) });
}

/** The property holds for `runs` random cases; other ones each time. */
export function holds<T>(what: string, property: fc.IProperty<T>, runs = 200): void {
  test(what, () => {
    const result = fc.check(property, { numRuns: runs, ...replay });
    if (!result.failed) return;
    const played = /replayPath="([^"]*)"/.exec(fc.stringify(result.counterexample))?.[1];
    const again = [result.seed, result.counterexamplePath, ...(played ? [played] : [])].join("/");
    const alone = `REPLAY='${again}' node --test --test-name-pattern='${what.replaceAll("'", ".")}' FILE`;
    throw new Error(`${fc.defaultReportMessage(result)}\nRun it alone: ${alone}`, {
      cause: result.errorInstance,
    });
  });
}

/** A broken twin: the property fails, in the same cases each time, and says `why`. */
export function fails<T>(what: string, property: fc.IProperty<T>, why: RegExp, runs = 2000): void {
  test(`broken twin: ${what}`, () => {
    const { failed, errorInstance } = fc.check(property, { numRuns: runs, seed: 1, endOnFailure: true });
    assert.ok(failed, `not caught in ${runs} cases`);
    assert.match(String(errorInstance), why);
  });
}
