/**
 * Properties as tests. A failure prints how to run the failing case alone:
 * REPLAY=seed/path[/commands] (commands: only where the property plays commands()).
 */
import assert from "node:assert/strict";
import test from "node:test";
import fc from "fast-check";

const REPLAY = process.env.REPLAY;

/** Commands against a model, for fc.modelRun. */
export function commands<Model extends object, Real>(
  each: fc.Arbitrary<fc.Command<Model, Real>>[],
  commandsMax: number,
  replay = REPLAY,
): fc.Arbitrary<Iterable<fc.Command<Model, Real>>> {
  const replayPath = replay?.split("/").slice(2).join("/");
  return fc.commands(each, { maxCommands: commandsMax, size: "max", ...(replayPath && { replayPath }) });
}

/** Look for a case in which the property fails; or play the one that `replay` names. Throws what to do about it. */
export function hold<T>(what: string, property: fc.IProperty<T>, runs: number, replay = REPLAY): void {
  const [seed, path] = replay?.split("/") ?? [];
  const alone = path && { seed: Number(seed), path, endOnFailure: true };
  const result = fc.check(property, { numRuns: runs, ...alone });
  if (!result.failed) return;
  const played = /replayPath="([^"]*)"/.exec(fc.stringify(result.counterexample))?.[1];
  const again = [result.seed, result.counterexamplePath, ...(played ? [played] : [])].join("/");
  const command = `REPLAY='${again}' node --test --test-name-pattern='${what.replaceAll("'", ".")}' FILE`;
  throw new Error(`${fc.defaultReportMessage(result)}\nRun it alone: ${command}`, {
    cause: result.errorInstance,
  });
}

/** The property holds for `runs` random cases; other ones each time. */
export function holds<T>(what: string, property: fc.IProperty<T>, runs = 200): void {
  test(what, () => hold(what, property, runs));
}

/** A broken twin: the property fails, in the same cases each time, and says `why`. */
export function fails<T>(what: string, property: fc.IProperty<T>, why: RegExp, runs = 2000): void {
  test(`broken twin: ${what}`, () => {
    const { failed, errorInstance } = fc.check(property, { numRuns: runs, seed: 1, endOnFailure: true });
    assert.ok(failed, `not caught in ${runs} cases`);
    assert.match(String(errorInstance), why);
  });
}
