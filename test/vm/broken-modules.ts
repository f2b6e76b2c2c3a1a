/** Guests without a device of ours, and kernel modules that are broken on purpose. */
import assert from "node:assert/strict";
import { appendFileSync, cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { TestContext } from "node:test";
import { ensureGuest } from "../../src/machine/qemu/guest.ts";
import { GUEST_SOURCES } from "../../src/machine/qemu/module.ts";
import { type Qemu, startQemu } from "../../src/machine/qemu/qemu.ts";
import { MACHINE } from "../vectors/driver-cases.ts";

export const SOURCES = join(GUEST_SOURCES, "linux");

/** A guest without any device of ours, for a module made from `sources`. */
export async function bootedGuest(sources: string): Promise<Qemu> {
  const guest = await ensureGuest((text) => console.log(text), sources);
  const qemu = await startQemu({ ...guest, ...MACHINE, accel: "auto" });
  await qemu.resume();
  await qemu.agent.hello(90_000);
  return qemu;
}

export interface Twin {
  readonly what: string;
  readonly file: string;
  /** Occurs once in the file. */
  readonly sound: string;
  /** TWIN: 1 while the module is to be this twin, else 0. */
  readonly broken: string;
}

/**
 * The folder of one module that can be each of `twins`, by its parameter "twin": 1 is the first, 0 the sound module. It
 * goes when the test ends.
 */
export function writeTwins(t: TestContext, twins: readonly Twin[]): string {
  const folder = mkdtempSync(join(tmpdir(), "coiommu-twins-"));
  t.after(() => rmSync(folder, { recursive: true }));
  cpSync(SOURCES, folder, { recursive: true });
  for (const [i, { file, sound, broken }] of twins.entries()) {
    const [before, after, ...more] = readFileSync(join(folder, file), "utf8").split(sound);
    assert.ok(after !== undefined && more.length === 0, `${file} does not have "${sound}" once`);
    writeFileSync(
      join(folder, file),
      before + broken.replaceAll("TWIN", `(coiommu_twin == ${i + 1})`) + after,
    );
  }
  appendFileSync(join(folder, "coiommu_abi.h"), "extern int coiommu_twin;\n");
  appendFileSync(
    join(folder, "main.c"),
    "int coiommu_twin;\nmodule_param_named(twin, coiommu_twin, int, 0);\n",
  );
  return folder;
}
