import assert from "node:assert/strict";
import test from "node:test";
import { HostError, UserError } from "../base/errors.ts";
import type { WorkerHost } from "../machine/commands.ts";
import { DirtyFrames } from "./dirty.ts";

const slice = (more: boolean, ...ranges: number[]) => ({ ranges: Float64Array.from(ranges), more });

/** Frames whose backend answers harvests one after the other. */
function answered(answers: unknown[]): DirtyFrames {
  const request = async (command: string) => {
    if (command !== "dirtyHarvest") return null;
    const answer = answers.shift();
    if (answer instanceof Error) throw answer;
    return answer;
  };
  return new DirtyFrames({ request } as WorkerHost);
}

test("what a failed harvest had been given is in the next one; a new start forgets it", async () => {
  const failure = new HostError("mmap", "ENOMEM");
  const dirty = answered([
    slice(true, 7, 1),
    failure,
    slice(false, 9, 2),
    slice(true, 1, 1),
    failure,
    slice(false),
  ]);
  await assert.rejects(dirty.harvest(), failure);
  assert.deepEqual(await dirty.harvest(), [7, 1, 9, 2]);
  await assert.rejects(dirty.harvest(), failure);
  await dirty.start();
  assert.deepEqual(await dirty.harvest(), []);
});

test("a harvest while another is under way is refused, and takes nothing from it", async () => {
  const dirty = answered([slice(true, 7, 1), slice(false, 9, 2)]);
  const first = dirty.harvest();
  await assert.rejects(dirty.harvest(), UserError);
  assert.deepEqual(await first, [7, 1, 9, 2]);
});
