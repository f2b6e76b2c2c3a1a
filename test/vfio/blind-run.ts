/**
 * `coiommu run --device` with a backend that is broken on purpose. Prints what became of it, as JSON: the workload's
 * result, or why there is none.
 */
import { milliseconds, parseBdf } from "../../src/base/units.ts";
import { EmbeddedMachine } from "../../src/control/embedded.ts";
import type { EmbeddedOptions } from "../../src/control/embedded-plan.ts";
import { run } from "../../src/control/run.ts";
import { parseWorkload } from "../../src/control/workload.ts";
import { workerEntry } from "../../src/machine/commands.ts";

const options: EmbeddedOptions = {
  ...{ memoryMiB: 128, cpus: 1, strategy: "coiommu", policy: "lru", pinner: "vfio" },
  ...{ interval: milliseconds(50), quota: Number.POSITIVE_INFINITY, disk: { sizeMiB: 64 } },
  ...{ beforeActivation: "none", activationTimeout: Number.POSITIVE_INFINITY },
  device: { bdf: parseBdf(process.argv[2]!)!, overwrite: false },
  workload: parseWorkload("fio:rw=randread,iodepth=16,seconds=3,size=8M"),
  backendEntry: workerEntry(import.meta.url, "./blind-backend"),
};
const outcome = await run(
  options,
  () => EmbeddedMachine.start(options),
  () => {},
).then(
  ({ result }) => result.workload,
  (error: Error) => ({ failure: error.message }),
);
console.log(JSON.stringify(outcome));
