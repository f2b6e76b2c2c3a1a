/**
 * What it takes to create a guest with a VFIO device, by memory size: from the start of the machine to the moment when its
 * driver has the disk, with all of its RAM pinned beforehand and with coIOMMU.
 */
import { execFileSync } from "node:child_process";
import { readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import type { RunResult } from "../../src/control/result.ts";
import { spread } from "../compare.ts";
import type { CreationCase } from "./report.ts";

const PROGRAM = fileURLToPath(new URL("../../bin/coiommu.js", import.meta.url));
const STRATEGIES = ["static", "coiommu"] as const;
type Strategy = (typeof STRATEGIES)[number];

export function creation(device: string, memoryMiB: number, rounds: number): CreationCase {
  const found: Record<Strategy, RunResult["creation"][]> = { static: [], coiommu: [] };
  for (let round = 0; round < rounds; round++)
    for (const strategy of round % 2 ? STRATEGIES : STRATEGIES.toReversed())
      found[strategy].push(created(device, memoryMiB, strategy));
  const total = (strategy: Strategy) => found[strategy].map(({ toUserspaceMs }) => toUserspaceMs);
  const pinMs = (strategy: Strategy) => spread(found[strategy].map((of) => of.pinMs));
  return {
    memoryMiB,
    coiommu: spread(total("coiommu")),
    static: spread(total("static")),
    ratio: spread(total("static").map((ms, i) => ms / total("coiommu")[i]!)),
    pinMs: { coiommu: pinMs("coiommu"), static: pinMs("static") },
  };
}

function created(device: string, memoryMiB: number, strategy: Strategy): RunResult["creation"] {
  const file = join(tmpdir(), `coiommu-creation-${process.pid}.json`);
  const options = ["--machine", "embedded", "--device", device, "--memory", `${memoryMiB}M`];
  try {
    execFileSync(
      process.execPath,
      [PROGRAM, "run", ...options, "--strategy", strategy, "--workload", "idle:seconds=1", "--json", file],
      { stdio: ["ignore", "ignore", "pipe"] },
    );
    return (JSON.parse(readFileSync(file, "utf8")) as RunResult).creation;
  } finally {
    rmSync(file, { force: true });
  }
}
